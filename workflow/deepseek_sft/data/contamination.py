"""Which records hold texts of evaluation sets, whole, in part or slightly changed.

A text of a set is looked for by its runs of four words (six characters where there are no spaces). Where one stands in
a message, the text counts as found if 80 % of its words stand at their places around it (texts of less than 32 words,
52 characters; of less than 16 words, 26 characters, all its numbers too), or if runs that stand close together make up
65 % of it (texts of 16 words, 26 characters, and more). A text too short for either, below eight words or 13
characters, is found where a user's message is just this text. Runs that more than ten texts of the sets share are how
the set asks, not what it asks: they do not count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .text_tokens import BREAK, CHARACTER, WORD, Numbers, Reader, Tokens

RUN = {WORD: 4, CHARACTER: 6}  # tokens that are looked up together
LEAST = {WORD: 8, CHARACTER: 13}  # tokens of a text that runs are looked up of
COVERED, ALIGNED = 2, 4  # texts of so many times LEAST and more are found by their runs; of less, by their places
SHARE, ALIGNED_SHARE = 0.65, 0.8
MOST_TEXTS = 10  # of the sets that may share a run
APART = 32  # tokens between two runs that still belong together
LEAST_WHOLE = 4  # tokens of a text that a message may be just
BLOCK = 1 << 17  # characters that are compared at once
LONGEST, OVERLAP = 1 << 18, 1 << 13  # characters of a message that are compared at once, and again with what follows
ROWS = 4096  # runs of short texts that are aligned at once
Integers = NDArray[np.int64]
Runs = NDArray[np.uint64]

_FACTORS = np.random.default_rng(8).integers(1 << 63, size=ALIGNED * LEAST[CHARACTER], dtype=np.uint64) * np.uint64(2)
_FACTORS += np.uint64(1)
_WIDTHS = np.array([RUN.get(kind, 0) for kind in range(max(CHARACTER, WORD, BREAK) + 1)])
_AGAIN = np.uint64(0x9E3779B97F4A7C15)
_PAIR_SHIFT = np.uint64(64 - 15)  # bits of a number of message and text by which tokens are added up


@dataclass(frozen=True, order=True)
class Match:
    """A text of an evaluation set in a record.

    Attributes:
        share: of its words that were found.
        found, words: their numbers; characters where there are no spaces.
        text: number of the text.
    """

    share: float
    found: int
    words: int
    text: int


@dataclass
class Index:
    """Texts of evaluation sets, made for being looked for: some 200 bytes a word.

    Attributes:
        runs: numbers of all runs, sorted; ``offsets`` says which ``texts`` and ``places`` (in them) each has.
        totals: by text, its tokens that lie in such runs.
        long: by text, whether it is found by its runs.
        short: by text, its row in ``rows``, which hold the tokens of short texts (0 behind their end), or -1; ``fixed``
            says of each token whether the text is another one without it.
        whole: number of a text's tokens → the text, for texts that messages are compared with as a whole.
        needed: by text, the fewest tokens that its runs in a message must have together for it to be found there.
        common, common_again: whether a run may be in ``runs``, by its first bits and by other ones; a bit each, so that
            they stay in a core's cache.
        begins: where in ``runs`` those begin that have these first bits.
        uncompared: numbers of the texts that cannot be looked for: too short, or like too many others.
    """

    runs: Runs
    offsets: Integers
    texts: NDArray[np.int32]
    places: NDArray[np.int32]
    totals: Integers
    long: NDArray[np.bool_]
    short: Integers
    rows: Numbers
    fixed: NDArray[np.bool_]
    lengths: Integers
    whole: dict[int, int] = field(default_factory=dict)
    whole_lengths: frozenset[int] = frozenset()
    uncompared: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bits = max(16, min(24, (len(self.runs) * 8).bit_length()))
        self.reader = Reader()
        self.shift = np.uint64(64 - bits)
        self.common, self.common_again = (_bits(runs >> self.shift, bits) for runs in (self.runs, self.runs * _AGAIN))
        self.begins_shift = self.shift + np.uint64(3)
        firsts = np.arange(1 << bits - 3, dtype=np.uint64) << self.begins_shift
        self.begins = np.minimum(np.searchsorted(self.runs, firsts), len(self.runs) - 1).astype(np.int32)
        several = np.where(self.long, 2 * RUN[WORD], 1)  # of a longer text one run is no evidence
        needed = np.where(self.short >= 0, several, np.inf)
        self.needed = np.minimum(needed, np.where(self.long, SHARE * self.totals, np.inf))

    def find(self, records: Sequence[Sequence[tuple[str, bool]]]) -> list[list[Match]]:
        """The texts that each record holds, the one that most is found of first.

        Args:
            records: of each its messages' texts, and whether a user wrote it.
        """
        found: list[dict[int, Match]] = [{} for _ in records]
        for block in _blocks(records):
            taken = self.reader.tokens([text for _, text, _ in block])
            best = self._runs_found(taken)
            for text, message in self._whole_found(taken, [asked for _, _, asked in block]):
                length = int(self.lengths[text])
                best[message, text] = Match(1.0, length, length, text)
            for (message, text), match in best.items():
                own = found[block[message][0]]
                own[text] = max(match, own.get(text, match))
        return [sorted(own.values(), key=lambda one: (-one.share, -one.found, one.text)) for own in found]

    def _runs_found(self, taken: Tokens) -> dict[tuple[int, int], Match]:
        at, run, width = self._hits(taken)
        if not len(at):
            return {}
        counts = self.offsets[run + 1] - self.offsets[run]
        entry = np.repeat(self.offsets[run] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        text = self.texts[entry]
        message = np.searchsorted(taken.starts, at, side="right") - 1
        kept, pair = self._candidates(np.repeat(message, counts), text, np.repeat(width, counts))
        hit = np.repeat(np.arange(len(at)), counts)[kept]
        at, width, message, text = at[hit], width[hit], message[hit], text[kept].astype(np.int64)
        place = self.places[entry[kept]].astype(np.int64)
        count, most = _together(pair, width)
        short = (self.short[text] >= 0) & (count > self.long[text])
        found = self._aligned(taken.values, message[short], text[short], (at - place)[short])
        long = np.flatnonzero(self.long[text] & (most >= SHARE * self.totals[text]))
        order = long[np.lexsort((at[long], text[long], message[long]))]
        message, text, at, place, width = (values[order] for values in (message, text, at, place, width))
        new = _changes(message, text)
        new[1:] |= at[1:] - at[:-1] > APART
        group = np.cumsum(new) - 1
        order = np.lexsort((place, group))
        firsts = np.flatnonzero(new)
        covered = _covered(group[order], place[order], width[order], len(firsts))
        total = self.totals[text[firsts]]
        for number in np.flatnonzero(covered >= SHARE * total):
            which, words = int(text[firsts[number]]), int(total[number])
            match = Match(int(covered[number]) / words, int(covered[number]), words, which)
            key = int(message[firsts[number]]), which
            found[key] = max(match, found.get(key, match))
        return found

    def _candidates(self, message: Integers, text: NDArray[np.int32], width: Integers) -> tuple[Integers, Integers]:
        """Those of these runs by which their texts may be found, and the number of each one's message and text.

        Tokens are added up by a few bits of that number: what is left out has too few of them whatever shares its bits.
        """
        pair = message * len(self.totals) + text
        bucket = (pair.view(np.uint64) * _AGAIN >> _PAIR_SHIFT).view(np.int64)
        together = np.bincount(bucket, width, minlength=1)
        kept = np.flatnonzero(together[bucket] >= self.needed[text])
        return kept, pair[kept]

    def _hits(self, taken: Tokens) -> tuple[Integers, Integers, Integers]:
        """Where a run of the sets begins, which one, and its length."""
        numbers = _run_numbers(taken.values, taken.kinds)
        place = np.flatnonzero(_has(self.common, numbers >> self.shift))
        numbers = numbers[place]
        again = np.flatnonzero(_has(self.common_again, numbers * _AGAIN >> self.shift))
        place, numbers = place[again], numbers[again]
        if not len(self.runs):
            return place[:0], place[:0], place[:0]
        run = self.begins[(numbers >> self.begins_shift).view(np.int64)].astype(np.int64)
        last = len(self.runs) - 1
        while (before := (self.runs[run] < numbers) & (run < last)).any():
            run += before
        there = self.runs[run] == numbers
        place = place[there]
        return place, run[there], _WIDTHS[taken.kinds[place]]

    def _aligned(
        self, values: Numbers, message: Integers, text: Integers, begin: Integers
    ) -> dict[tuple[int, int], Match]:
        """Short texts of whose tokens enough stand at their places, where a text would begin there."""
        found: dict[tuple[int, int], Match] = {}
        _, once = np.unique(
            text * (len(values) + 2 * self.rows.shape[1]) + begin + self.rows.shape[1], return_index=True
        )
        for some in np.array_split(once, max(1, len(once) // ROWS)):
            which_rows = self.short[text[some]]
            rows = self.rows[which_rows]
            at = begin[some, None] + np.arange(rows.shape[1])
            inside = (at >= 0) & (at < len(values)) & (rows != 0)
            equal = (values[np.where(inside, at, 0)] == rows) & inside
            same, length = equal.sum(axis=1), self.lengths[text[some]]
            kept = (equal | ~self.fixed[which_rows]).all(axis=1)
            for number in np.flatnonzero(kept & (same >= ALIGNED_SHARE * length)):
                which, words, found_ = int(text[some[number]]), int(length[number]), int(same[number])
                key = int(message[some[number]]), which
                match = Match(found_ / words, found_, words, which)
                found[key] = max(match, found.get(key, match))
        return found

    def _whole_found(self, taken: Tokens, asked: list[bool]) -> Iterator[tuple[int, int]]:
        """Texts that a user's message is just, with the message's number."""
        lengths = np.diff(taken.starts) - 1
        for length in self.whole_lengths:
            for message in np.flatnonzero((lengths == length) & np.array(asked, bool)):
                start = taken.starts[message]
                text = self.whole.get(_number(taken.values[start : start + length]))
                if text is not None:
                    yield text, int(message)


def build(texts: Sequence[str]) -> Index:
    """An index of texts; equal ones count as the first of them."""
    runs, owners, places, widths = [], [], [], []
    lengths, least = np.zeros((2, len(texts)), np.int64)
    whole: dict[int, int] = {}
    rows = np.zeros((len(texts), ALIGNED * LEAST[CHARACTER] - 1), np.uint32)
    fixed = np.zeros(rows.shape, bool)
    known: dict[bytes, int] = {}
    reader = Reader(numeric=True)
    for first, block in _numbered_blocks(texts):
        taken = reader.tokens(block)
        new = np.zeros(len(block), bool)
        for number in range(len(block)):
            start, end = taken.starts[number], taken.starts[number + 1] - 1
            values, text = taken.values[start:end], first + number
            if known.setdefault(values.tobytes(), text) != text:
                continue
            of_characters = 2 * np.count_nonzero(taken.kinds[start:end] == CHARACTER) > len(values)
            kind = CHARACTER if of_characters else WORD
            lengths[text], least[text] = len(values), LEAST[kind]
            if len(values) < ALIGNED * LEAST[kind]:
                rows[text, : len(values)] = values
            if len(values) < COVERED * LEAST[kind]:
                fixed[text, : len(values)] = taken.numeric[start:end]
            new[number] = len(values) >= LEAST[kind]
        owner = np.repeat(np.arange(len(block)), np.diff(taken.starts))
        place = np.flatnonzero(_whole_runs(taken.kinds) & new[owner])
        runs.append(_run_numbers(taken.values, taken.kinds)[place])
        owners.append(first + owner[place])
        places.append(place - taken.starts[owner[place]])
        widths.append(_WIDTHS[taken.kinds[place]])
    run, owner, place, width = (
        np.concatenate([*of, np.zeros(0, kind)])
        for of, kind in ((runs, np.uint64), (owners, np.int64), (places, np.int64), (widths, np.int64))
    )
    order = np.lexsort((place, owner, run))
    order = order[_changes(run[order], owner[order])]  # of a text's equal runs the first
    firsts = np.flatnonzero(_changes(run[order]))
    counts = np.diff(np.append(firsts, len(order)))
    kept = order[np.repeat(counts <= MOST_TEXTS, counts)]
    counts = counts[counts <= MOST_TEXTS]
    by_text = kept[np.lexsort((place[kept], owner[kept]))]
    totals = _covered(owner[by_text], place[by_text], width[by_text], len(texts))
    long = (lengths >= COVERED * least) & (totals >= least)
    short = (rows[:, 0] != 0) & (totals > 0)
    for text in np.flatnonzero(~long & ~short & (lengths >= LEAST_WHOLE) & (rows[:, 0] != 0)):
        length = int(lengths[text])
        whole[_number(rows[text, :length])] = int(text)
    found = np.isin(np.arange(len(texts)), [*whole.values(), *_repeated(known, len(texts))]) | long | short
    offsets = np.append(0, np.cumsum(counts))
    return Index(
        runs=run[kept[offsets[:-1]]] if len(kept) else run[:0],
        offsets=offsets,
        texts=owner[kept].astype(np.int32),
        places=place[kept].astype(np.int32),
        totals=totals,
        long=long,
        short=np.where(short, np.cumsum(short) - 1, -1),
        rows=rows[short],
        fixed=fixed[short],
        lengths=lengths,
        whole=whole,
        whole_lengths=frozenset(int(lengths[text]) for text in whole.values()),
        uncompared=tuple(np.flatnonzero(~found).tolist()),
    )


def _repeated(known: dict[bytes, int], count: int) -> list[int]:
    """Texts that an earlier one equals."""
    return sorted(set(range(count)) - set(known.values()))


def _blocks(records: Sequence[Sequence[tuple[str, bool]]]) -> Iterator[list[tuple[int, str, bool]]]:
    """Messages with the numbers of their records; of a long one pieces that overlap."""
    block: list[tuple[int, str, bool]] = []
    size = 0
    for number, record in enumerate(records):
        for text, asked in record:
            for begin in range(0, max(1, len(text) - OVERLAP), LONGEST - OVERLAP):
                piece = text[begin : begin + LONGEST] if len(text) > LONGEST else text
                block.append((number, piece, asked))
                size += len(piece)
                if size >= BLOCK:
                    yield block
                    block, size = [], 0
    if block:
        yield block


def _numbered_blocks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    begin = size = 0
    for number, text in enumerate(texts, 1):
        size += len(text)
        if size >= BLOCK or number == len(texts):
            yield begin, texts[begin:number]
            begin, size = number, 0


def _number(values: Numbers) -> int:
    """One number of all tokens of a short text."""
    return int((values * _FACTORS[: len(values)]).sum(dtype=np.uint64))


def _run_numbers(values: Numbers, kinds: NDArray[np.uint8]) -> Runs:
    """A number for the run that begins at each token: of six tokens where it is a character, else of four."""
    padded = np.zeros(len(values) + 5, np.uint64)
    padded[: len(values)] = values
    count = len(values) + 3
    three = padded[:count] * _FACTORS[0]
    three += padded[1 : count + 1] * _FACTORS[1]
    three += padded[2 : count + 2] * _FACTORS[2]
    numbers = padded[3:count] * _FACTORS[3]
    numbers += three[:-3]
    characters = np.flatnonzero(kinds == CHARACTER)
    numbers[characters] = three[characters] * _FACTORS[4] + three[characters + 3]
    return numbers


def _whole_runs(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether the run that begins at each token is one: within its text, and after a word of words alone."""
    padded = np.append(kinds, np.full(RUN[CHARACTER], BREAK))
    words = np.all([padded[i : i + len(kinds)] == WORD for i in range(RUN[WORD])], axis=0)
    unbroken = np.all([padded[i : i + len(kinds)] != BREAK for i in range(RUN[CHARACTER])], axis=0)
    return words | ((kinds == CHARACTER) & unbroken)


def _bits(numbers: Runs, bits: int) -> NDArray[np.uint8]:
    """A set of numbers below 2 ** bits, a bit each."""
    found = np.zeros(1 << bits, bool)
    found[numbers] = True
    return np.packbits(found, bitorder="little")


def _has(found: NDArray[np.uint8], numbers: Runs) -> NDArray[np.bool_]:
    """Whether each number is in a set of ``_bits``; the numbers are used up."""
    bit = numbers.view(np.uint8)[::8] & np.uint8(7)  # the least byte comes first
    numbers >>= np.uint64(3)
    there = found.take(numbers.view(np.int64))
    there >>= bit
    there &= np.uint8(1)
    return there.view(bool)


def _together(pair: Integers, width: Integers) -> tuple[Integers, Integers]:
    """For each run, the number and the tokens of all runs of its message and text."""
    order = np.argsort(pair, kind="stable")
    firsts = np.flatnonzero(_changes(pair[order]))
    sizes = np.diff(np.append(firsts, len(order)))
    count, most = np.empty((2, len(order)), np.int64)
    count[order] = np.repeat(sizes, sizes)
    most[order] = np.repeat(np.add.reduceat(width[order], firsts), sizes)
    return count, most


def _changes(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where a row differs from the one before it; true for the first."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def _covered(group: Integers, place: Integers, width: Integers, groups: int) -> Integers:
    """By group, how many places its runs cover together; rows sorted by group and place."""
    steps = width.copy()
    steps[:-1] = np.where(group[1:] == group[:-1], np.minimum(width[:-1], place[1:] - place[:-1]), width[:-1])
    return np.bincount(group, steps, minlength=groups).astype(np.int64)
