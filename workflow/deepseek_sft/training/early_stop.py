"""Signals that arrive while train.py starts or ends. Imports nothing slow: the program's first act."""

import signal

_arrived: list[int] = []


def catch() -> None:
    """From now on USR1 is remembered and SIGTERM waits, until ``launch`` has its handlers in place.

    SIGTERM waits because srun sends it to the other nodes' programs as soon as one ends with an error: what all nodes
    find wrong at the same time must end with its own exit code on all of them, not with 143.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: _arrived.append(number))
    hold_termination()


def ignore() -> None:
    """The program ends: USR1 is of no use any more, and must not kill it while the interpreter shuts down."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def hold_termination() -> None:
    """SIGTERM waits."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def allow_termination() -> None:
    """SIGTERM arrives, also one that waited."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def arrived() -> bool:
    """Whether USR1 came since ``catch``."""
    return bool(_arrived)
