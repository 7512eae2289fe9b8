"""The stand-in's CUDA, where preflight reads it."""

cuda = "13.0"
