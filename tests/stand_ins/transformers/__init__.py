"""A stand-in: preflight looks for transformers, and nothing imports it."""
