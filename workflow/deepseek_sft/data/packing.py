"""Packing: several samples in one row, so that rows are nearly as long as allowed.

Attention must not cross samples within a row; ``sample_lengths`` tells training where they end.
"""

import bisect

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    Each sample, longest first, goes to the fullest row that still takes it. Rows come out in the order of their
    earliest sample, and samples within a row in their own order: the order of the data survives as far as it can.

    Args:
        lengths: length of every sample, none above ``capacity``.
        capacity: longest row.

    Returns:
        Sample numbers of every row.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # sorted distinct free spaces
    open_rows: dict[int, list[int]] = {}  # free space → numbers of rows that have it
    for sample in np.argsort(-lengths, kind="stable"):
        length = int(lengths[sample])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(int(sample))
        left = space - length
        if left not in open_rows:
            bisect.insort(spaces, left)
            open_rows[left] = []
        open_rows[left].append(row)
    return sorted(sorted(row) for row in rows)
