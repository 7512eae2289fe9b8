"""A stop signal that arrives while train.py still starts. Imports nothing slow: the program's first act."""

import signal

_arrived: list[int] = []


def catch() -> None:
    """From now on USR1 is remembered instead of killing this process; ``launch`` installs the real handler later."""
    signal.signal(signal.SIGUSR1, lambda number, frame: _arrived.append(number))


def arrived() -> bool:
    """Whether USR1 came since ``catch``."""
    return bool(_arrived)
