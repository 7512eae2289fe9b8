"""The matrix products of several experts on rows sorted by expert: gate and up, SwiGLU, down; forward and backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

GROUPED_ALIGNMENT = 16  # bytes: every row of an operand must begin at a multiple
GROUPED_CAPABILITY = (9, 0)  # from Hopper on torch has one kernel for all groups; before, it loops on the host itself


def choose(requested: str, device: torch.device, dtype: torch.dtype, hidden: int, ffn: int) -> bool:
    """Whether to use grouped products: for ``auto``, ``grouped`` or ``loop``.

    ``auto`` is a fixed rule, so that a resumed run computes as before: grouped where torch has one kernel for all
    experts, which saves launches and fills the GPU when experts get few tokens; on CPU the loop, since grouped
    products are a loop there, too (docs/training.md has the measured table, ``benchmarks/train.py --products`` measures
    any machine).

    Raises:
        ValueError: grouped products are asked for and torch cannot do them with this dtype or these sizes.
    """
    possible = hasattr(F, "grouped_mm") and dtype in (torch.bfloat16, torch.float32)
    aligned = all(size * dtype.itemsize % GROUPED_ALIGNMENT == 0 for size in (hidden, ffn))
    if requested == "grouped" and not (possible and aligned):
        raise ValueError(f"this torch has no grouped product for {dtype} with sizes {hidden} and {ffn}")
    if requested != "auto":
        return requested == "grouped"
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    return possible and aligned and torch.cuda.get_device_capability(device) >= GROUPED_CAPABILITY


@dataclass(frozen=True)
class Counts:
    """How many rows each expert of a shard has.

    Attributes:
        rows: of each expert, on the host.
        ends: int32 [experts] on the rows' device, where each expert's rows end, for one product of all experts; None
            for one product each.
    """

    rows: list[int]
    ends: torch.Tensor | None = None


def counts_of_shards(counted: torch.Tensor, experts_per_shard: int, grouped: bool) -> list[Counts]:
    """Counts of every shard of a layer; the host waits for the device this once.

    Offsets are made on the device: one that came from the host would stop the stream in every product.

    Args:
        counted: int64 [experts], rows of each.
    """
    shards = counted.view(-1, experts_per_shard)
    ends = shards.cumsum(1, dtype=torch.int32).unbind() if grouped else [None] * len(shards)
    return [Counts(rows, end) for rows, end in zip(shards.tolist(), ends, strict=True)]


def inverse(places: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [size]: at which place of ``places`` each number stands, -1 for none."""
    found = places.new_full((size,), -1)
    found[places] = torch.arange(len(places), device=places.device)
    return found


def by_expert(sizes: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64: which row of (source, expert) stands where in (expert, source), and back.

    Args:
        sizes: int64 [source, expert], rows of each.
        rows: their sum, which the device is not asked for.
    """
    experts = torch.arange(sizes.shape[1], device=sizes.device).repeat(len(sizes))
    order = torch.repeat_interleave(experts, sizes.flatten(), output_size=rows).argsort(stable=True)
    return order, inverse(order, rows)


class ExpertProducts(torch.autograd.Function):
    """SwiGLU of several experts, each on its own rows.

    Saves the rows, the first product and the two parameters themselves: a view of a parameter, as autograd would save
    it, keeps the gathered weights of a ZeRO-3 shard in memory until the backward pass. Gradients of the parameters
    are written in place, expert by expert.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, w1w3: torch.Tensor, w2: torch.Tensor, counts: Counts) -> torch.Tensor:
        """rows [n, hidden] sorted by expert, w1w3 [experts, 2·ffn, hidden], w2 [experts, hidden, ffn] → [n, hidden].

        Args:
            counts: of the shard's experts.
        """
        outputs, gate_up = products(rows, w1w3, w2, counts)
        ctx.save_for_backward(rows, gate_up, w1w3, w2)
        ctx.counts = counts
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        rows, gate_up, w1w3, w2 = ctx.saved_tensors
        found = products_backward(rows, gate_up, w1w3, w2, gradient.contiguous(), ctx.counts)
        return found.rows, found.w1w3, found.w2, None


def products(
    rows: torch.Tensor, w1w3: torch.Tensor, w2: torch.Tensor, counts: Counts, outputs: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Outputs [n, hidden] (None unless wanted) and the first product [n, 2·ffn]; sizes as in ``ExpertProducts``."""
    gate_up = _times_transposed(rows, w1w3, counts)
    if not outputs:
        return None, gate_up
    gate, up = gate_up.chunk(2, dim=-1)
    return _times_transposed(F.silu(gate) * up, w2, counts), gate_up


@dataclass(frozen=True)
class Gradients:
    """Of ``products``; ``of_rows`` fp32 [n] of the rows' weights, None without weights."""

    rows: torch.Tensor
    w1w3: torch.Tensor
    w2: torch.Tensor
    of_rows: torch.Tensor | None = None


def products_backward(
    rows: torch.Tensor,
    gate_up: torch.Tensor,
    w1w3: torch.Tensor,
    w2: torch.Tensor,
    gradient: torch.Tensor,
    counts: Counts,
    weights: torch.Tensor | None = None,
) -> Gradients:
    """Gradients from the outputs' [n, hidden], contiguous.

    Args:
        weights: fp32 [n]; ``gradient`` is then that of the weighted outputs, whatever these were summed with.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate)
    inner, product, of_rows = _times(gradient, w2, counts), activated * up, None
    if weights is not None:
        of_rows = torch.linalg.vecdot(inner.float(), product.float())
        inner = (inner.float() * weights[:, None]).to(inner.dtype)
        gradient = (gradient.float() * weights[:, None]).to(gradient.dtype)
    w2_gradient = _outer(gradient, product, counts)
    del product
    gate_up_gradient = torch.empty_like(gate_up)
    gate_gradient, up_gradient = gate_up_gradient.chunk(2, dim=-1)
    torch.mul(inner, activated, out=up_gradient)
    gate_gradient.copy_(torch.ops.aten.silu_backward(inner.mul_(up), gate))
    del inner, activated
    w1w3_gradient = _outer(gate_up_gradient, rows, counts)
    return Gradients(_times(gate_up_gradient, w1w3, counts), w1w3_gradient, w2_gradient, of_rows)


class ParameterGradients:
    """Gradients of a shard's parameters over chunks: of the only one as they are, of several their sums in fp32."""

    def __init__(self, chunks: int):
        self._chunks = chunks
        self._found: list[torch.Tensor] = []

    def add(self, found: Gradients) -> None:
        each = (found.w1w3, found.w2)
        if self._chunks == 1:
            self._found = list(each)
            return
        self._found = self._found or [torch.zeros_like(one, dtype=torch.float32) for one in each]
        for total, one in zip(self._found, each, strict=True):
            total += one

    def of(self, w1w3: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Once all chunks are added, in the parameters' dtypes."""
        first, second = self._found
        return first.to(w1w3.dtype), second.to(w2.dtype)


def _ranges(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and their rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _without_rows(counts: list[int]) -> Iterator[slice]:
    """Experts that have none, neighbours together."""
    start = None
    for expert, count in enumerate([*counts, 1]):
        if count and start is not None:
            yield slice(start, expert)
            start = None
        elif not count and start is None:
            start = expert


def _times(rows: torch.Tensor, weights: torch.Tensor, counts: Counts) -> torch.Tensor:
    """rows [n, k] · weights [experts, k, m] → [n, m]."""
    if counts.ends is not None and len(rows):
        return F.grouped_mm(rows, weights, offs=counts.ends)
    product = rows.new_empty(len(rows), weights.shape[2])
    for expert, part in _ranges(counts.rows):
        torch.mm(rows[part], weights[expert], out=product[part])
    return product


def _times_transposed(rows: torch.Tensor, weights: torch.Tensor, counts: Counts) -> torch.Tensor:
    """rows [n, k] · weights [experts, m, k] transposed → [n, m]."""
    return _times(rows, weights.transpose(1, 2), counts)


def _outer(left: torch.Tensor, right: torch.Tensor, counts: Counts) -> torch.Tensor:
    """left [n, m] transposed · right [n, k], over each expert's rows → [experts, m, k]; zero for experts without."""
    if counts.ends is not None and len(left):
        product = F.grouped_mm(left.T, right, offs=counts.ends)
    else:
        product = left.new_empty(len(counts.rows), left.shape[1], right.shape[1])
        for expert, part in _ranges(counts.rows):
            torch.mm(left[part].T, right[part], out=product[expert])
    for unused in _without_rows(counts.rows):
        product[unused].zero_()
    return product
