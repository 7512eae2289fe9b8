"""A stand-in: preflight looks for xtuner, and nothing imports it."""
