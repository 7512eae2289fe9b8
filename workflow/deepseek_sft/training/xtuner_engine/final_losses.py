"""The losses of a few training rows under the final weights, for the served model to be compared with.

Computed where the weights are, by the engine that trained them. Every data-parallel group computes rows of its own, at
the same time: under ZeRO-3 all ranks must enter every layer together.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from xtuner.parallel.sequence import (
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_sequence_parallel_group,
    get_sequence_parallel_rank,
    get_sequence_parallel_world_size,
)

from ...data import loss_rows
from ...data.tokens import TokenDataset
from .evaluating import evaluating
from .micro_batches import NO_LOSS, MicroBatch, pad


def measure(engine: Any, tokens: Path, dtype: str, step: int) -> dict[str, Any]:
    """The record that ``loss_rows`` specifies, on all ranks; a collective.

    Args:
        engine: DeepSpeed's, with the weights to measure.
        tokens: folder of the token dataset.
        dtype: of the weights.
        step: after which they are what they are.
    """
    dataset = TokenDataset(tokens)
    box = [loss_rows.choose(dataset) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, device=engine.device)
    samples = box[0]
    groups, group = get_data_parallel_world_size(), get_data_parallel_rank()
    own: dict[int, list[float]] = {}
    with evaluating(engine):
        for first in range(0, len(samples), groups):
            number = (first + group) % len(samples)  # a group without a row of its own enters with another's
            losses = _losses_of(engine, dataset, samples[number])
            if get_sequence_parallel_rank() == 0:
                own[number] = losses
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    together = {number: losses for one in told for number, losses in one.items()}
    return loss_rows.record(dataset, samples, [together[n] for n in range(len(samples))], dtype, step)


def _losses_of(engine: Any, dataset: TokenDataset, sample: loss_rows.Sample) -> list[float]:
    """Losses of all tokens of a sample but the first, up to the longest measured, on every rank of the group."""
    length = min(sample.length, loss_rows.LONGEST)
    ids = dataset[sample.row]["input_ids"][sample.start : sample.start + length]
    row = {"input_ids": ids, "labels": ids, "sample_lengths": np.array([length])}
    batch = pad([row], get_sequence_parallel_world_size())
    losses = engine(batch.to(engine.device), of_each_token=True)
    return _gathered(losses, batch)


def _gathered(losses: torch.Tensor, batch: MicroBatch) -> list[float]:
    """The row's losses in order, from the parts of the sequence-parallel ranks: each holds its columns' targets."""
    ranks = get_sequence_parallel_world_size()
    if ranks == 1:
        return losses.tolist()
    columns = batch.targets.shape[1] // ranks
    counts = [int((part != NO_LOSS).sum()) for part in batch.targets.split(columns, dim=1)]
    padded = losses.new_zeros(columns)
    padded[: len(losses)] = losses
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=get_sequence_parallel_group())
    return [value for part, count in zip(parts, counts, strict=True) for value in part[:count].tolist()]
