"""Texts as 32-bit numbers of their words, for comparing what they say: case, accents and punctuation do not count.

Words are runs of letters and digits. Scripts written without spaces (Chinese, Japanese, Thai …) give a token for every
character. Characters beyond the Basic Multilingual Plane separate words.
"""

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint32]

SPACE, WORD, CHARACTER, BREAK = range(4)  # what a character is to the text; a break stands between two texts
UNSPACED = (  # first and last character of scripts that put no spaces between words
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)
_LAST = np.uint32(0x9E3779B9)  # stands for what follows a word
_BREAK = "\uffff"  # no character
_BETWEEN = f" {_BREAK} ".encode("utf-16-le")
_KIND = np.uint8(3)


@dataclass(frozen=True)
class Tokens:
    """Tokens of several texts in a row, a break after each.

    Attributes:
        values: of every token.
        kinds: WORD, CHARACTER or BREAK, uint8.
        starts: index of the first token of every text, and one more: the number of tokens.
        numeric: whether a token begins with a digit; empty where the reader was not asked for it.
    """

    values: Numbers
    kinds: NDArray[np.uint8]
    starts: NDArray[np.int64]
    numeric: NDArray[np.bool_]


class Reader:
    """Makes tokens of texts. Its arrays are used again: asking for memory takes longer than what is done in it."""

    def __init__(self, numeric: bool = False) -> None:
        self._numbers = _numbers_of_characters()
        self._digits = self._numbers[ord("0") : ord("9") + 1] if numeric else self._numbers[:0]
        self._size = 0

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Tokens of texts."""
        parts, codes = _encoded(texts)
        if _any_between(codes, 0x0300, 0x036F):  # accents by themselves
            parts, codes = _encoded([unicodedata.normalize("NFC", text) for text in texts])
        count = len(codes)
        self._grow(count)
        index, begins = self._index[:count], self._begins[:count]
        index[:] = codes
        numbers = np.take(self._numbers, index, out=self._taken[:count], mode="clip")
        written = np.not_equal(numbers, 0, out=self._written[:count])
        begins[:1] = written[:1]
        np.greater(written[1:], written[:-1], out=begins[1:])
        # Each character counts with the one after it, so that a word's number depends on their order.
        following = self._following[:count]
        np.add(numbers[1:], _LAST, out=following[:-1])
        following[-1:] = _LAST
        if unspaced := _any_between(codes, UNSPACED[0][0], UNSPACED[-1][1]):
            kinds = numbers.view(np.uint8)[::4] & _KIND
            word = kinds == WORD
            begins[1:] |= written[1:] & ~(word[1:] & word[:-1])
            following[np.flatnonzero(word[:-1] & (kinds[1:] == CHARACTER))] = _LAST  # no part of the word
        following *= numbers
        firsts = np.flatnonzero(begins)
        sums = np.cumsum(following, dtype=np.uint32, out=self._sums[1 : count + 1])
        values = np.diff(self._sums[firsts], append=sums[-1:])
        kinds = numbers[firsts].view(np.uint8)[::4] & _KIND
        if unspaced:
            alone = np.flatnonzero(kinds == CHARACTER)
            values[alone] = numbers[firsts[alone]]
        ends = np.cumsum([len(part) // 2 for part in parts]).reshape(-1, 2)[:, 1]
        starts = np.zeros(len(texts) + 1, np.int64)
        starts[1:] = np.searchsorted(firsts, ends)
        return Tokens(values, kinds, starts, self._numeric(numbers, firsts))

    def _numeric(self, numbers: Numbers, firsts: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.isin(numbers[firsts], self._digits) if len(self._digits) else np.zeros(0, bool)

    def _grow(self, count: int) -> None:
        if count > self._size:
            self._size = count
            self._index = np.empty(count, np.intp)
            self._taken, self._following, self._sums = (np.zeros(count + 1, np.uint32) for _ in range(3))
            self._written, self._begins = np.empty((2, count), bool)


def _encoded(texts: Sequence[str]) -> tuple[list[bytes], NDArray[np.uint16]]:
    """Texts and what stands between them in UTF-16, and the codes of all together."""
    parts = [part for text in texts for part in (text.encode("utf-16-le", "surrogatepass"), _BETWEEN)]
    return parts, np.frombuffer(b"".join(parts), np.uint16)


def _any_between(codes: NDArray[np.uint16], first: int, last: int) -> bool:
    """Whether a code lies there; smaller ones wrap to the end."""
    return bool((codes - np.uint16(first) <= np.uint16(last - first)).any())


@functools.cache
def _numbers_of_characters() -> Numbers:
    """By character a random number, its kind in the last two bits; equal for characters that read alike."""
    random = np.random.default_rng(20251128).integers(1 << 30, size=1 << 16, dtype=np.uint32) * np.uint32(4)
    folded, kinds = np.arange(1 << 16), np.zeros(1 << 16, np.uint32)
    for code in range(1 << 16):
        character = chr(code)
        if unicodedata.category(character)[0] in "LNM":
            kinds[code] = WORD
            folded[code] = ord(_plain(character))
    for first, last in UNSPACED:
        kinds[first : last + 1] *= np.uint32(CHARACTER)
    kinds[ord(_BREAK)] = BREAK
    numbers = random[folded] + kinds
    numbers[kinds == SPACE] = 0
    return numbers


def _plain(character: str) -> str:
    """A letter small and without accents, full-width forms as ordinary ones; itself where that would be several."""
    base, *marks = unicodedata.normalize("NFKD", character)
    plain = base if all(map(unicodedata.combining, marks)) else character
    small = plain.lower()
    return small if len(small) == 1 and ord(small) < 1 << 16 else character
