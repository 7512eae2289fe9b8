"""Which attention kernel computes a micro batch: a pure function of the device, the versions and the rows.

On GPUs MLA's heads of 192 (queries, keys) and 128 (values) fit few kernels. cuDNN takes them as they are on Hopper; the
kernels that torch carries otherwise want one size, so that values are padded with zeros.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

UNPADDED, PADDED, VARLEN, FLASH = "sdpa, unpadded", "sdpa, padded values", "torch varlen, padded values", "flash-attn"
CUDNN_SIZES = (192, 128)
CUDNN_LEAST = 91100  # 9.11, as torch.backends.cudnn.version() says it
CUDNN_TORCH, VARLEN_TORCH = (2, 11), (2, 11)
LARGEST_HEAD = 256  # of the flash kernels that torch carries
# Samples of packed rows are launched one by one by SDPA, all at once by the variable-length kernel. By capability's
# major number: median tokens of a sample from which one by one is taken. An estimate: not measured.
ONE_BY_ONE_FROM = {9: 4096}


@dataclass(frozen=True)
class Device:
    """What decides besides the rows.

    Attributes:
        capability: compute capability; None on CPU.
        torch: version's first two numbers.
        cudnn: ``torch.backends.cudnn.version()``; None without.
    """

    capability: tuple[int, int] | None
    torch: tuple[int, int]
    cudnn: int | None


def cudnn_takes(device: Device, sizes: tuple[int, int]) -> bool:
    """Whether cuDNN serves these sizes of (query, value) heads, forward and backward."""
    hopper = device.capability is not None and device.capability[0] == 9
    return hopper and device.torch >= CUDNN_TORCH and (device.cudnn or 0) >= CUDNN_LEAST and sizes == CUDNN_SIZES


def choose(
    requested: str, device: Device, sizes: tuple[int, int], packed: bool = False, lengths: Sequence[int] = ()
) -> str:
    """The kernel for rows whose samples have these lengths.

    Args:
        requested: ``auto``, ``sdpa`` or ``flash`` (flash-attn, which is taken by choice alone).
        sizes: of a query's and of a value's head.
    """
    if requested == "flash":
        return FLASH
    if device.capability is None:
        return PADDED
    single = UNPADDED if cudnn_takes(device, sizes) else PADDED
    if requested == "sdpa" or not packed:
        return single
    if device.capability < (8, 0) or device.torch < VARLEN_TORCH or max(sizes) > LARGEST_HEAD:
        return single
    least = ONE_BY_ONE_FROM.get(device.capability[0])
    one_by_one = single == UNPADDED and least is not None and bool(lengths) and statistics.median(lengths) >= least
    return UNPADDED if one_by_one else VARLEN
