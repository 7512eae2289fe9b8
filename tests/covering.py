"""Few combinations of settings in which every pair of values stands that can stand together."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Combination = dict[str, Any]
ATTEMPTS = 20


def pairs(combination: Combination) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """All pairs of (name, value) in it."""
    return set(itertools.combinations(sorted(combination.items()), 2))


def covering(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Combination], bool]) -> list[Combination]:
    """Combinations with every pair of an allowed combination, few of them; the same ones every time.

    Each next one has most pairs that are missing still; of several attempts, which break ties by chance, the shortest.
    """
    possible = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    with_pairs = [(one, pairs(one)) for one in possible if allowed(one)]
    every = set().union(*(found for _, found in with_pairs))
    best: list[Combination] = []
    for seed in range(ATTEMPTS):
        shuffled, missing, chosen = list(with_pairs), set(every), []
        random.Random(seed).shuffle(shuffled)
        while missing and (not best or len(chosen) < len(best)):
            one, found = max(shuffled, key=lambda entry: len(entry[1] & missing))
            chosen.append(one)
            missing -= found
        if not missing and (not best or len(chosen) < len(best)):
            best = chosen
    return best
