"""Exact and fast ids for DeepSeek's tokenizer: its word splitting as one compiled pattern, ids of words remembered.

The library splits a text in three passes of a slow regular-expression engine and merges every word anew. Here one
pattern of Python's engine does the three passes at once, and each distinct word is merged once, by the library's own
model. The classes of characters are asked of the library, so that both agree on every character by construction.
Used only where a tokenizer's description is the one this pattern was written for; otherwise the library encodes.

Python's engine is fast for classes within the Basic Multilingual Plane. A character beyond it (an emoji) is matched as
a stand-in, one private character per class; texts that hold a stand-in themselves are left to the library.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, pre_tokenizers

NUMBERS = r"\p{N}{1,3}"
CJK = "[一-龥぀-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^""" + "\r\n" + r"""\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[""" + "\r\n" + r"""]*|\s*[""" + "\r\n" + r"""]+|\s+(?!\S)|\s+"""
)
CJK_RANGES = (("一", "龥"), ("぀", "ゟ"), ("゠", "ヿ"))
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
REMEMBERED = 300_000  # words; about 60 MB
LONGEST_REMEMBERED = 40  # characters; longer words hardly recur
BEYOND = re.compile("[\U00010000-\U0010ffff]")
UNUSUAL = re.compile("[\ue000-\ue005\U00010000-\U0010ffff]")
STAND_INS = {r"\p{L}": "\ue000", r"\p{N}": "\ue001", r"\p{P}": "\ue002", r"\p{S}": "\ue003", r"\p{M}": "\ue004"}
CLASSLESS = "\ue005"
OWN_STAND_INS = re.compile("[\ue000-\ue005]")
Ids = NDArray[np.int32]


class _Remembered(dict[str, bytes]):
    """Ids of pieces of text as int32 bytes; what is missing is computed."""

    def __init__(self, compute: Callable[[str], bytes]):
        super().__init__()
        self.compute = compute

    def __missing__(self, piece: str) -> bytes:
        ids = self.compute(piece)
        if len(piece) <= LONGEST_REMEMBERED:
            if len(self) >= REMEMBERED:
                self.clear()
            self[piece] = ids
        return ids


class _LibraryNeeded(Exception):
    """A text holds a stand-in itself."""


class WordEncoder:
    """Encoder of texts; made by ``word_encoder``.

    No word goes over a space that follows another character than white space, and none depends on what lies beyond it.
    What stands between such spaces is remembered as a whole, which spares the slower pattern of words.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._model = tokenizer.model
        self._split = _safe_space().split
        self._words = _pattern().findall
        self._ids = _Remembered(self._merge)
        self._after_space = _Remembered(lambda piece: self._run(" " + piece))

    def encode(self, text: str) -> Ids | None:
        """Ids of a text, int32; None where the library must encode it."""
        first, *pieces = self._split(text)
        try:
            end = self._run(" " + pieces.pop()) if pieces else b""  # may end with white space, as no other piece does
            return np.frombuffer(
                self._run(first) + b"".join(map(self._after_space.__getitem__, pieces)) + end, np.int32
            )
        except _LibraryNeeded:
            return None

    def _run(self, text: str) -> bytes:
        """Ids of a text by itself, as int32 bytes."""
        if text.isascii() or not UNUSUAL.search(text):
            words = self._words(text)
        elif OWN_STAND_INS.search(text):
            raise _LibraryNeeded
        else:
            shown = self._words(BEYOND.sub(lambda found: _stand_in(found[0]), text))
            ends = list(itertools.accumulate(map(len, shown)))
            words = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if sum(map(len, words)) != len(text):  # cannot be: the alternatives take every character
            raise _LibraryNeeded
        return b"".join(map(self._ids.__getitem__, words))

    def _merge(self, word: str) -> bytes:
        spelled = "".join([BYTE_CHARACTERS[byte] for byte in word.encode()])
        return np.array([token.id for token in self._model.tokenize(spelled)], np.int32).tobytes()


def word_encoder(tokenizer: Tokenizer, description: dict[str, Any]) -> WordEncoder | None:
    """The fast encoder, if ``description`` (tokenizer.json) is of the kind it is exact for."""
    normalizer, model = description.get("normalizer") or {}, description.get("model") or {}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    expected = {
        "type": "Sequence",
        "pretokenizers": [
            *(split | {"pattern": {"Regex": pattern}} for pattern in (NUMBERS, CJK, WORDS)),
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    plain = not normalizer or (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers"))
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    merges = model.get("type") == "BPE" and not any(model.get(name) for name in (*options, "ignore_merges"))
    return WordEncoder(tokenizer) if plain and merges and description.get("pre_tokenizer") == expected else None


@functools.cache
def _pattern() -> re.Pattern[str]:
    """The three passes as one. Earlier passes cut the text, so characters they take end a word for later ones."""
    everything = _everything()
    letters, numbers, punctuation, symbols, marks = (
        _members(everything, name) | {stand_in} for name, stand_in in STAND_INS.items()
    )
    spaces = _spaces()
    cjk = {chr(code) for low, high in CJK_RANGES for code in range(ord(low), ord(high) + 1)} - numbers
    cjk_word, cjk_sign = cjk & (letters | marks), cjk & (punctuation | symbols)
    cjk_rest = cjk - cjk_word - cjk_sign  # unassigned
    taken = numbers | cjk
    rest = set(everything) - taken
    before_word = rest - letters - punctuation - symbols - {"\r", "\n"}
    space, ends = _class(spaces - taken), "[\r\n]"
    # Alternatives that cannot begin at the same place are sorted by how often they occur.
    alternatives = [
        f"{_class(before_word)}?{_class((letters | marks) - taken)}+",
        f"{_class(numbers)}{{1,3}}",
        # The third pass splits what the second cut out, so both sides of these stay within the run.
        f"{_class(cjk_rest)}?{_class(cjk_word)}+",
        f"{_class(cjk_sign)}+",
        f"(?:{_class(cjk_rest)}(?!{_class(cjk_word)}))+",
        f"{_class(set(ASCII_PUNCTUATION))}[A-Za-z]+",
        f" ?{_class((punctuation | symbols) - taken)}+{ends}*",
        f"{space}*{ends}+",
        f"{space}+(?!{_class(rest - spaces)})",
        f"{space}+",
        # What no pattern takes stays together between those that do.
        f"(?:{_class(before_word - spaces - marks)}(?!{_class((letters | marks) - taken)}))+",
    ]
    return re.compile("|".join(alternatives))


@functools.cache
def _everything() -> str:
    """Every character of the Basic Multilingual Plane."""
    return "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000)


@functools.cache
def _safe_space() -> re.Pattern[str]:
    """A space after another character than what the library, or Python, takes for white space."""
    return re.compile(rf" (?<![\s{_class(_spaces())[1:-1]}] )")


@functools.cache
def _spaces() -> frozenset[str]:
    """What the library's engine counts to white space."""
    return frozenset(_members(_everything(), r"\s"))


@functools.cache
def _stand_in(character: str) -> str:
    return next((own for name, own in STAND_INS.items() if _members(character, name)), CLASSLESS)


def _members(characters: str, name: str) -> set[str]:
    """The characters that the library's engine counts to a class."""
    splitter = pre_tokenizers.Split(Regex(f"{name}+"), "removed", invert=True)
    return set().union(*(piece for piece, _ in splitter.pre_tokenize_str(characters)))


def _class(characters: Iterable[str]) -> str:
    codes = sorted(map(ord, characters))
    runs = (list(run) for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]))
    return "[" + "".join(f"\\u{run[0][1]:04x}-\\u{run[-1][1]:04x}" for run in runs) + "]"


def _byte_characters() -> list[str]:
    """The characters that byte-level tokenizers write bytes as: printable ones themselves, others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()
