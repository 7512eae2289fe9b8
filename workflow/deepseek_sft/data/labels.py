"""The label of tokens that are not trained; a module of its own, as serving has no pyarrow to import ``tokens``."""

NO_LOSS = -100  # what cross entropy ignores, by PyTorch's default
