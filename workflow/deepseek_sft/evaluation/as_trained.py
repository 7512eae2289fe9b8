"""The served model is the trained one: its losses on the rows that training left with its final weights.

Training computed them in its own engine (``data/loss_rows.py``), of every token; the server is asked for the
log-probabilities of the same tokens. It works at any size, where transformers cannot be asked.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from .. import receipts
from ..data import loss_rows
from ..errors import BadInputError
from .api import CheckFailed
from .transformers_comparison import ModelFolder

NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Bound:
    """Largest differences of a correct model, in nats.

    Attributes:
        mean: of the sample's mean loss.
        absolute: of the losses of single tokens, their mean.
        share: of the tokens whose losses are further apart than FAR.
    """

    mean: float
    absolute: float
    share: float


FAR = 0.1  # nats: rounding moves few tokens so far, other weights many
# By the coarser of the dtypes of training and serving; measured, see docs/serving.md.
BOUNDS = {"float32": Bound(0.0005, 0.003, 0.01), "bfloat16": Bound(0.01, 0.04, 0.02), "fp8": Bound(0.05, 0.15, 0.45)}
COARSENESS = ("float32", "bfloat16", "fp8")


@dataclasses.dataclass(frozen=True)
class Trained:
    """Losses that training left.

    Attributes:
        dtype: of training's weights.
        rows: names, for messages.
        tokens: token ids of each row.
        losses: nats of every token but the first of each row.
    """

    dtype: str
    rows: list[str]
    tokens: list[list[int]]
    losses: list[list[float]]

    def cut(self, longest: int) -> "Trained":
        """The first ``longest`` tokens of each row: a token's loss depends on those before it alone."""
        return dataclasses.replace(
            self,
            tokens=[ids[:longest] for ids in self.tokens],
            losses=[values[: longest - 1] for values in self.losses],
        )


def read(verified: Path) -> Trained | None:
    """The losses that the receipt of verify_model passes on; None where training left none.

    Raises:
        BadInputError: they are not in the form that training writes.
    """
    found = receipts.read(verified, "verify_model")["figures"].get(loss_rows.KEY)
    if found is None:
        return None
    try:
        return parse(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{verified}: {loss_rows.KEY} is malformed: {error!r}", "run verify_model again") from None


def parse(found: dict[str, Any]) -> Trained:
    """Losses from their record; see ``loss_rows``."""
    if found["format"] != loss_rows.FORMAT:
        raise ValueError(f"format {found['format']!r}, this version reads {loss_rows.FORMAT}")
    rows = found["rows"]
    tokens = [[int(token) for token in row["tokens"]] for row in rows]
    losses = [[float(value) for value in row["losses"]] for row in rows]
    if not rows or any(len(ids) != len(values) + 1 or not values for ids, values in zip(tokens, losses, strict=True)):
        raise ValueError("every row needs one loss for each token but the first")
    if not all(math.isfinite(value) for row in losses for value in row):
        raise ValueError("a loss is not finite")
    return Trained(str(found["dtype"]), [str(row["id"]) for row in rows], tokens, losses)


def judged_as(trained: str, model: ModelFolder | None, served: str) -> str:
    """The dtype whose bounds hold: the coarser of training's and serving's.

    Args:
        served: what the server was told.
    """
    dtype = model.format(served) if model else served
    known = [name if name in COARSENESS else "bfloat16" for name in (trained, dtype)]
    return max(known, key=COARSENESS.index)


def compare(
    trained: Trained, served: list[list[float]], judged: str, factor: float = 1.0
) -> tuple[dict[str, Any], list[str]]:
    """Figures of the comparison, and what is wrong.

    Args:
        served: log-probabilities of every token but the first of each row.
        factor: by which the bounds are multiplied.
    """
    pairs = [
        [(-logprob, loss) for logprob, loss in zip(row, losses, strict=True)]
        for row, losses in zip(served, trained.losses, strict=True)
    ]
    differences = [ours - theirs for row in pairs for ours, theirs in row]
    count = len(differences)
    figures = {
        "rows": len(pairs),
        "tokens": count,
        "longest": max(map(len, trained.tokens)),
        "trained": sum(theirs for row in pairs for _, theirs in row) / count,
        "served": sum(ours for row in pairs for ours, _ in row) / count,
        "mean_difference": sum(differences) / count,
        "mean_absolute_difference": sum(map(abs, differences)) / count,
        "share_far": sum(abs(difference) > FAR for difference in differences) / count,
        "largest_difference": max(map(abs, differences)),
        "judged_as": judged,
    }
    mean, absolute, share = (factor * value for value in dataclasses.astuple(BOUNDS[judged]))
    wrong = []
    if not abs(figures["mean_difference"]) <= mean:
        wrong.append(f"the mean loss differs by {figures['mean_difference']:+.5f}, expected at most {mean:g}")
    if not figures["mean_absolute_difference"] <= absolute:
        found = figures["mean_absolute_difference"]
        wrong.append(f"single tokens differ by {found:.5f} in the mean, expected at most {absolute:g}")
    if not figures["share_far"] <= share:
        wrong.append(f"{figures['share_far']:.4f} of the tokens differ by more than {FAR}, expected at most {share:g}")
    return {name: round(v, 6) if isinstance(v, float) else v for name, v in figures.items()}, wrong


def verdict(figures: dict[str, Any], wrong: list[str]) -> str:
    """The check's detail.

    Raises:
        CheckFailed: something is wrong.
    """
    text = (
        f"loss {figures['trained']:.4f} in training, {figures['served']:.4f} served; single tokens differ by "
        f"{figures['mean_absolute_difference']:.5f} in the mean, {figures['share_far']:.4f} by more than {FAR}; "
        f"{figures['tokens']} tokens of {figures['rows']} rows, the longest of {figures['longest']}, judged as "
        f"{figures['judged_as']}"
    )
    if wrong:
        raise CheckFailed(f"{'; '.join(wrong)} ({text}): the server does not compute what was trained")
    return text
