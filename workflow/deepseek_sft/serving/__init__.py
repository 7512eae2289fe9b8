"""Serving a model with vLLM over one or several nodes; its API is tested by ``evaluation``."""
