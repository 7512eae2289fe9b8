"""Serving a model with vLLM over one or several nodes, and testing the API it offers."""
