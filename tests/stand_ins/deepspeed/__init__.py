"""A stand-in: nothing here imports deepspeed."""
