class ChildFailedError(Exception):
    """Never raised: the stand-ins of ranks do not fail."""
