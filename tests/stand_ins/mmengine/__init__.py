"""A stand-in: preflight looks for mmengine, and nothing imports it."""
