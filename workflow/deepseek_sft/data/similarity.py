"""What texts have in common: near duplicates by MinHash, and the script that a text is written in."""

from array import array
from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5  # tokens
BANDS, ROWS = 6, 4  # two texts that share three quarters of their shingles meet in a band with probability 0.9
SAMPLED_ABOVE = 512  # shingles; of longer texts every eighth is looked at, the same ones in every text
Signature = NDArray[np.uint64]

_RANDOM = np.random.default_rng(20250120)
_FACTOR = int(_RANDOM.integers(1 << 63)) * 2 + 1
_PLACES = np.array([_FACTOR**power % (1 << 64) for power in range(SHINGLE)], np.uint64)
_PERMUTATIONS = _RANDOM.integers(1 << 63, size=(BANDS * ROWS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_MIXERS = _RANDOM.integers(1 << 63, size=ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def signature(ids: NDArray[np.int32]) -> Signature:
    """MinHash signature of token ids: one number per band; texts that share one are near duplicates."""
    tokens = ids.astype(np.uint64) + np.uint64(1)
    count = max(1, len(tokens) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    for offset, factor in enumerate(_PLACES[: len(tokens)]):
        hashes += tokens[offset : offset + count] * factor
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(_FACTOR)
    if count > SAMPLED_ABOVE:
        kept = hashes[hashes >> np.uint64(61) == 0]
        hashes = kept if len(kept) >= 16 else hashes
    smallest = (hashes[None] * _PERMUTATIONS >> np.uint64(32)).min(axis=1)
    return (smallest.reshape(BANDS, ROWS) * _MIXERS).sum(axis=1, dtype=np.uint64)


class NearDuplicates:
    """Counts texts that nearly repeat an earlier one; 48 bytes a text."""

    def __init__(self) -> None:
        self._bands = array("Q")

    def add(self, found: Signature) -> None:
        """Take a text's signature."""
        self._bands.frombytes(found.tobytes())

    def count(self) -> int:
        """Number of texts that share a band with an earlier one."""
        bands = np.frombuffer(self._bands, np.uint64).reshape(-1, BANDS)
        repeated = np.zeros(len(bands), bool)
        for band in range(BANDS):
            first = np.unique(bands[:, band], return_index=True)[1]
            again = np.ones(len(bands), bool)
            again[first] = False
            repeated |= again
        return int(repeated.sum())


SCRIPTS = (  # first and last character, name, and how many letters one of its characters says as much as
    ("A", "Z", "Latin script", 1),
    ("a", "z", "Latin script", 1),
    ("\u00c0", "\u024f", "Latin script", 1),
    ("\u0370", "\u03ff", "Greek script", 1),
    ("\u0400", "\u052f", "Cyrillic script", 1),
    ("\u0590", "\u05ff", "Hebrew script", 1),
    ("\u0600", "\u06ff", "Arabic script", 1),
    ("\u0900", "\u097f", "Devanagari script", 1),
    ("\u0e00", "\u0e7f", "Thai", 1),
    ("\u1100", "\u11ff", "Korean", 1),
    ("\u3040", "\u30ff", "Japanese", 3),
    ("\u3400", "\u4dbf", "Chinese", 3),
    ("\u4e00", "\u9fff", "Chinese", 3),
    ("\uac00", "\ud7af", "Korean", 3),
)
LOOKED_AT = 2000  # characters of a conversation
_EDGES = np.array([edge for low, high, _, _ in SCRIPTS for edge in (ord(low), ord(high) + 1)], np.uint16)


def language(texts: Iterable[str]) -> str:
    """The script most of a conversation is written in, named by its language where it has only one.

    Kana decide for Japanese, which is written with Chinese characters too.
    """
    text = ""
    for part in texts:
        text += part[: LOOKED_AT - len(text)]
        if len(text) >= LOOKED_AT:
            break
    codes = np.frombuffer(text.encode("utf-16-le", "replace"), np.uint16)
    found = np.bincount(np.searchsorted(_EDGES, codes, side="right"), minlength=2 * len(SCRIPTS) + 1)
    counts: Counter[str] = Counter()
    for number, (_, _, name, weight) in enumerate(SCRIPTS):
        counts[name] += int(found[2 * number + 1]) * weight
    if counts["Japanese"] * 5 > counts["Chinese"]:
        counts["Japanese"] += counts["Chinese"]
    best, count = counts.most_common(1)[0]
    return best if count else "no letters"
