"""A stand-in: preflight looks for deepspeed, and nothing imports it."""
