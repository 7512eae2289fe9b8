"""Packing: several samples in one row, so that rows are nearly as long as allowed.

Attention must not cross samples within a row; ``sample_lengths`` tells training where they end.
"""

import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int32], capacity: int, originals: Sequence[int] | None = None) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    Each sample, longest first, goes to the fullest row that still takes it. Rows come out in the order of their
    earliest sample, and samples within a row in their own order: the order of the data survives as far as it can.

    Args:
        lengths: length of every sample, none above ``capacity``.
        capacity: longest row.
        originals: of every sample a number that its copies share, -1 where it has none. Copies never share a row,
            where one step would see the same text twice.

    Returns:
        Sample numbers of every row.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # sorted distinct free spaces
    open_rows: dict[int, list[int]] = {}  # free space → numbers of rows that have it
    held: dict[int, set[int]] = {}  # original → rows that hold a copy of it
    for sample in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sample])
        original = originals[sample] if originals else -1
        taken = held.setdefault(original, set()) if original >= 0 else set()
        at, place = _open_row(spaces, open_rows, bisect.bisect_left(spaces, length), taken)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop(place)
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        taken.add(row)
        rows[row].append(int(sample))
        left = space - length
        if left not in open_rows:
            bisect.insort(spaces, left)
            open_rows[left] = []
        open_rows[left].append(row)
    return sorted(sorted(row) for row in rows)


def _open_row(spaces: list[int], open_rows: dict[int, list[int]], at: int, taken: set[int]) -> tuple[int, int]:
    """Index of the smallest space from ``at`` on with a row that is not taken, and that row's place among its rows."""
    if not taken:
        return at, -1
    while at < len(spaces):
        rows = open_rows[spaces[at]]
        for place in range(len(rows) - 1, -1, -1):
            if rows[place] not in taken:
                return at, place
        at += 1
    return at, -1
