"""Rows of the token dataset as micro batches: which of a step, padded, and the batch on the device."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from xtuner.parallel.sequence import get_data_parallel_rank, get_data_parallel_world_size

from ...data import dealing
from ...data.tokens import TokenDataset
from ..schedule import rows_from
from ..settings import Settings

NO_LOSS = -100


@dataclass
class MicroBatch:
    """One forward pass of a sequence-parallel group; all tensors [rows, length], padded on the right.

    Attributes:
        input_ids: int64; padding is token 0.
        targets: int64, the token that follows each position, or -100 where none is learned. Shifted here, over the
            whole row, before it is split across ranks: no target is lost at the cuts.
        position_ids: int64, from 0 in every sample.
        sample_of: int32, index of the sample in its row; padding counts as one more.
        valid: bool, False on padding.
        packed: whether any row holds more than one sample.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    sample_of: torch.Tensor
    valid: torch.Tensor
    packed: bool

    @property
    def trained_tokens(self) -> int:
        return int((self.targets != NO_LOSS).sum())

    @property
    def tokens(self) -> int:
        return int(self.valid.sum())

    @property
    def attention_pairs(self) -> int:
        """Queries and the keys before them in their sample, itself included."""
        return int(((self.position_ids + 1) * self.valid).sum())

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return MicroBatch(**moved)


@dataclass(frozen=True)
class Step:
    """What one step trains on.

    Attributes:
        batches: this group's micro batches: all of them, so that their trained tokens are known before the step begins.
        slots: token slots that the step takes on all groups, see ``dealing.slots``.
    """

    batches: list[MicroBatch]
    slots: int


class StepRows:
    """The rows that this rank's data-parallel group trains on, by step: resuming skips nothing one by one.

    Args:
        tokens: folder of the token dataset, which is memory-mapped.
        settings: seed, micro batch, accumulation, and how rows are dealt.
        pairs_per_token: see ``dealing.Rows.costs``.
        rows_after: rows of the global order that are consumed after a step; None: all steps are of one size.
    """

    def __init__(
        self,
        tokens: str | Path,
        settings: Settings,
        pairs_per_token: int,
        rows_after: Callable[[int], int] | None = None,
    ):
        self.dataset, self.settings, self.pairs_per_token = TokenDataset(tokens), settings, pairs_per_token
        self.rows_after = rows_after
        self.rows = self.dataset.rows()

    def of_step(self, step: int) -> Step:
        """Of step ``step``, from 1."""
        settings, multiple = self.settings, self.settings.sequence_parallel_size
        groups, micro_batch = get_data_parallel_world_size(), settings.micro_batch_size
        shape = settings.gradient_accumulation_steps, groups, micro_batch
        count = math.prod(shape)
        first = (step - 1) * count if self.rows_after is None else self.rows_after(step - 1)
        chosen = rows_from(len(self.rows), settings.seed, first, count)
        if settings.deal_rows == "cost":
            costs = self.rows.of(chosen).costs(self.pairs_per_token)
            dealt = chosen[dealing.deal(costs, micro_batch, shape[0], groups, settings.seed, step)]
        else:
            dealt = chosen.reshape(shape)
        own = dealt[:, get_data_parallel_rank()].ravel().tolist()
        batches = collate([self.dataset[row] for row in own], micro_batch, multiple)
        return Step(batches, dealing.slots(self.rows.lengths[dealt], multiple))


def collate(rows: list[dict[str, Any]], micro_batch: int, multiple: int) -> list[MicroBatch]:
    """Cut a step's rows into micro batches, each as long as its longest row, rounded up to ``multiple``."""
    return [pad(rows[start : start + micro_batch], multiple) for start in range(0, len(rows), micro_batch)]


def pad(rows: list[dict[str, Any]], multiple: int) -> MicroBatch:
    """One micro batch of rows with ``input_ids``, ``labels`` (not shifted) and ``sample_lengths``."""
    longest = max(len(row["input_ids"]) for row in rows)
    shape = len(rows), -(-longest // multiple) * multiple
    input_ids = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, NO_LOSS, dtype=torch.int64)
    position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
    sample_of = torch.zeros(shape, dtype=torch.int32)
    valid = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"], dtype=torch.int64)
        targets[i, : length - 1] = torch.tensor(row["labels"], dtype=torch.int64)[1:]
        valid[i, :length] = True
        start = 0
        for sample, size in enumerate(map(int, row["sample_lengths"])):
            position_ids[i, start : start + size] = torch.arange(size)
            sample_of[i, start : start + size] = sample
            targets[i, start + size - 1] = NO_LOSS  # its last token does not predict the next sample's first
            start += size
        if start != length:
            raise ValueError(f"row {row.get('id')}: sample_lengths sum to {start}, it has {length} tokens")
        sample_of[i, length:] = len(row["sample_lengths"])
    packed = any(len(row["sample_lengths"]) > 1 for row in rows)
    return MicroBatch(input_ids, targets, position_ids, sample_of, valid, packed)


def shown_rows(batches: list[MicroBatch]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Samples of micro batches as they are trained on: name, tokens, and whether the position before learns each.

    Raises:
        RuntimeError: a target is not the token that follows.
    """
    for number, batch in enumerate(batches):
        for row in range(batch.input_ids.shape[0]):
            valid = int(batch.valid[row].sum())
            ids, targets = batch.input_ids[row, :valid], batch.targets[row, :valid]
            learned = targets != NO_LOSS
            following = ids.roll(-1)
            if bool((targets[learned] != following[learned]).any()):
                raise RuntimeError(f"micro batch {number}, row {row}: a target is not the token that follows")
            of_token = [False, *learned[:-1].tolist()]
            samples = batch.sample_of[row, :valid].tolist()
            for sample in sorted(set(samples)):
                start, end = samples.index(sample), valid - samples[::-1].index(sample)
                name = f"micro batch {number}, row {row}, sample {sample}"
                yield name, ids[start:end].tolist(), of_token[start:end]
