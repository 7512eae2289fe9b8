"""The first micro batches as text, with what is learned marked: what a person reads before spending GPU hours."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from .. import files
from ..data import tokenizer_files

NAME = "first_batch.txt"
ROWS = 16  # shown at most
LEGEND = """\
# What the first step of rank 0 trains on, decoded from the very batch. Each line is a run of tokens:
#   [trained] the model learns to produce these      [context] it only reads them
# A trained run is an answer of the assistant and its end-of-sentence token, nothing else.
"""


def read_tokenizer(base: Path) -> Tokenizer | None:
    """The base model's tokenizer; None where the folder has none."""
    if not tokenizer_files.vocabulary_file(base).exists():
        return None
    return Tokenizer.from_str(tokenizer_files.tokenizer_text(base))


def describe_row(name: str, ids: list[int], learned: list[bool], tokenizer: Tokenizer | None) -> str:
    """One sample as text: runs of learned and of other tokens in turn, special tokens shown.

    Args:
        ids: tokens of one sample.
        learned: for each token, whether a position predicts it with loss.
    """
    lines = [f"== {name}: {len(ids)} tokens, {sum(learned)} trained"]
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or learned[end] != learned[start]:
            run = ids[start:end]
            text = tokenizer.decode(run, skip_special_tokens=False) if tokenizer else " ".join(map(str, run))
            lines.append(("[trained] " if learned[start] else "[context] ") + text.replace("\n", "\n          "))
            start = end
    return "\n".join(lines)


def write(run: Path, rows: Iterable[tuple[str, list[int], list[bool]]], tokenizer: Tokenizer | None) -> Path:
    """Write ``first_batch.txt`` into the run folder: rows of name, tokens, and whether each is learned."""
    shown = [describe_row(*row, tokenizer) for row, _ in zip(rows, range(ROWS), strict=False)]
    note = "" if tokenizer else "# The base model has no tokenizer.json: numbers instead of text.\n"
    path = run / NAME
    files.write_text(path, LEGEND + note + "\n" + "\n\n".join(shown) + "\n")
    return path
