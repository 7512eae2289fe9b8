"""ZeRO-3's gathers and reduce-scatters with little Python: the same values as DeepSpeed's own, bit for bit.

DeepSpeed 0.19 cuts every gathered and every reduced tensor into one slice a rank, in Python: on 256 ranks that is most
of what the host does in a step (docs/training.md has figures). Here a whole parameter is one strided copy.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters, stage3
from torch.distributed import distributed_c10d

# Elements from which a parameter is gathered into memory of its own, which saves a copy, and not with others.
ALONE = 1 << 24
# A process group's own calls, past what torch looks up around them each time; older torch has the second names only.
_ALL_GATHER = getattr(dist.ProcessGroup, "all_gather_single", None) or dist.ProcessGroup._allgather_base
_REDUCE_SCATTER = getattr(dist.ProcessGroup, "reduce_scatter_single", None) or dist.ProcessGroup._reduce_scatter_base
_LATER = distributed_c10d.AllgatherOptions()
_LATER.asyncOp = True
_AT_ONCE = distributed_c10d.ReduceScatterOptions()
_AT_ONCE.asyncOp = False


def _all_gather(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> Any:
    """Begin to gather every rank's 1-D part into 1-D ``whole``; what is to be waited for."""
    return _ALL_GATHER(group, whole, part, _LATER)


def _reduce_scatter(part: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum of 1-D ``whole`` over ranks, of which this rank gets its 1-D part."""
    work = _REDUCE_SCATTER(group, part, whole, _AT_ONCE)
    if work is not None:
        work.wait()


def install(model: torch.nn.Module) -> bool:
    """Have the parameters of a model that ZeRO-3 has split, and its gradients, use what is below.

    Returns:
        False where DeepSpeed's own way stays: one rank, or quantised or twice kept weights (`train.deepspeed`).
    """
    # DeepSpeed's names of two collectives are torch's of yesterday, which says so at each call.
    warnings.filterwarnings(
        "ignore", message=r".*is deprecated. Please use `torch\.distributed\.", category=FutureWarning
    )
    parameters = list(model.parameters())
    plain = all(
        parameter.ds_secondary_tensor is None and not hasattr(parameter.ds_tensor, "ds_quant_scale")
        for parameter in parameters
    )
    if dist.get_world_size() == 1 or not plain:
        return False
    stage3.reduce_scatter_coalesced = reduce_scatter
    for parameter in parameters:
        parameter.all_gather_coalesced = gather
    return True


class Gathering:
    """Parameters on their way; DeepSpeed waits for it once for each of them, and only the first time counts.

    Args:
        alone: gathered each by itself, over the ranks that it is split over.
        together: gathered at once, each entry parameters that are split over the same ranks.
    """

    def __init__(self, alone: Sequence[Any], together: Sequence[Sequence[Any]]):
        self._parameters = [*alone, *(parameter for entry in together for parameter in entry)]
        self._handles = [_gather_alone(parameter) for parameter in alone]
        self._together: list[tuple[Sequence[Any], torch.Tensor]] = []
        for entry in together:
            handle, gathered = _gather_together(entry)
            self._handles.append(handle)
            self._together.append((entry, gathered))

    def wait(self, handle_dependency: bool = True) -> None:
        """Have the parameters whole in what follows on the stream."""
        if not self._parameters:
            return
        for handle in self._handles:
            if handle is not None:
                handle.wait()
        for entry, gathered in self._together:
            start = 0
            for parameter in entry:
                size = parameter.ds_tensor.ds_numel
                whole = gathered[:, start : start + size].reshape(-1)
                parameter.data = whole.narrow(0, 0, parameter.ds_numel).view(parameter.ds_shape)
                start += size
            if not get_accelerator().is_synchronized_device():
                gathered.record_stream(get_accelerator().current_stream())
        for parameter in self._parameters:
            parameter.ds_status = partition_parameters.ZeroParamStatus.AVAILABLE
        self._parameters, self._together, self._handles = [], [], []


def gather(parameters: Sequence[Any], safe_mode: bool = False, quantize: bool = False) -> Gathering:
    """Begin to gather parameters on all ranks; stands for ``Parameter.all_gather_coalesced`` of ZeRO-3."""
    status = partition_parameters.ZeroParamStatus
    ordered = sorted(parameters, key=lambda parameter: parameter.ds_id)  # alike on all ranks
    for parameter in ordered:
        if parameter.ds_status != status.NOT_AVAILABLE:
            raise RuntimeError(parameter.ds_summary())
        parameter.ds_status = status.INFLIGHT
    alone, together = [], {}
    for parameter in ordered:
        if parameter.ds_numel >= ALONE or parameter.ds_zero_partition_world_size == 1:
            alone.append(parameter)
        else:
            together.setdefault(id(parameter.ds_process_group), []).append(parameter)
    alone += [entry[0] for entry in together.values() if len(entry) == 1]  # it saves the copy, too
    return Gathering(alone, [entry for entry in together.values() if len(entry) > 1])


def _own_part(parameter: Any) -> torch.Tensor:
    """This rank's part on the device; from pinned memory without waiting for what the device does before."""
    return parameter.ds_tensor.to(_device(), non_blocking=True)


@functools.cache
def _device() -> torch.device:
    """The rank's, which stays."""
    return torch.device(get_accelerator().current_device_name())


def _gather_alone(parameter: Any) -> Any:
    """Into memory of its own, which becomes the parameter's; None where this rank has it all."""
    part, ranks = _own_part(parameter), parameter.ds_zero_partition_world_size
    whole = part if ranks == 1 else part.new_empty(part.numel() * ranks)
    handle = None if ranks == 1 else _all_gather(whole, part, parameter.ds_process_group)
    if whole.numel() != parameter.ds_numel:
        whole = whole.narrow(0, 0, parameter.ds_numel)
    parameter.data = whole.view(parameter.ds_shape)
    return handle


def _gather_together(parameters: Sequence[Any]) -> tuple[Any, torch.Tensor]:
    """Into one tensor, [ranks, elements]: every rank's part of each parameter, one after the other."""
    group = parameters[0].ds_process_group
    parts = [_own_part(parameter) for parameter in parameters]
    gathered = parts[0].new_empty(group.size(), sum(part.numel() for part in parts))
    own = gathered[group.rank()]
    torch.cat(parts, out=own)
    return _all_gather(gathered.view(-1), own, group), gathered


def reduce_scatter(tensors: list[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """Mean over ranks of each tensor, of which this rank gets its part; stands for ``reduce_scatter_coalesced``.

    Args:
        tensors: of one dtype; a single one that the ranks divide evenly is the buffer itself, as with DeepSpeed.

    Returns:
        1-D parts, ⌈elements / ranks⌉ of each but for the last ranks.
    """
    group = group or dist.group.WORLD
    ranks, rank = group.size(), group.rank()
    is_even = len(tensors) == 1 and tensors[0].numel() % ranks == 0
    sizes = [-(-tensor.numel() // ranks) for tensor in tensors]
    buffer = tensors[0].reshape(ranks, -1) if is_even else _laid_out(tensors, sizes, ranks)
    buffer.div_(ranks)  # before the sum, as DeepSpeed does
    part = buffer[rank]
    _reduce_scatter(part, buffer.view(-1), group)
    if is_even:
        return [part]
    ends = [max(0, min(size, tensor.numel() - rank * size)) for tensor, size in zip(tensors, sizes, strict=True)]
    return [piece[:end] for piece, end in zip(part.split(sizes), ends, strict=True)]


def _laid_out(tensors: list[torch.Tensor], sizes: list[int], ranks: int) -> torch.Tensor:
    """[ranks, sum of the sizes]: every rank's part of each tensor, one after the other; the rest is undefined."""
    buffer, start = tensors[0].new_empty(ranks, sum(sizes)), 0
    for tensor, size in zip(tensors, sizes, strict=True):
        flat, full = tensor.reshape(-1), tensor.numel() // max(size, 1)
        buffer[:full, start : start + size] = flat[: full * size].view(full, size)
        if rest := flat.numel() - full * size:
            buffer[full, start : start + rest] = flat[full * size :]
        start += size
    return buffer
