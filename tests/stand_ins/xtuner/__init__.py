"""A stand-in: nothing here imports xtuner."""
