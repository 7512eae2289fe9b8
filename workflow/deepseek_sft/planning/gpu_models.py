"""GPUs by name: what a plan counts with, and what works on them. Sources: the makers' data sheets, dense figures.

Memory is what PyTorch sees, in GiB, somewhat less than the sheet's. No figure was measured here, where there are no
GPUs.
"""

import re
from dataclasses import dataclass
from typing import Any

GROUPED = "grouped products of experts"
LOOP = "products of experts one by one (grouped from Hopper on), no FP8 arithmetic"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory_gib: memory that PyTorch sees.
        tflops: peak of dense BF16 matrix products, TFLOP/s.
        memory_tb_per_second: of its own memory.
        nvlink_gb_per_second: to the other GPUs of its node, each direction.
        pcie_gb_per_second: to its host, each direction.
        capability: compute capability.
        works: what is different on it.
    """

    memory_gib: float
    tflops: float
    memory_tb_per_second: float
    nvlink_gb_per_second: float
    pcie_gb_per_second: float
    capability: tuple[int, int]
    works: str

    @property
    def multiplies_fp8(self) -> bool:
        """Whether it has FP8 arithmetic (Ada and Hopper on)."""
        return self.capability >= (8, 9)


GPUS = {
    "a100-40gb": Gpu(39.4, 312, 1.56, 300, 31.5, (8, 0), LOOP),
    "a100-80gb": Gpu(79.1, 312, 2.04, 300, 31.5, (8, 0), LOOP),
    "h100": Gpu(79.1, 989, 3.35, 450, 63, (9, 0), GROUPED),
    "h800": Gpu(79.1, 989, 3.35, 200, 63, (9, 0), GROUPED),
    "h20": Gpu(95.0, 148, 4.0, 450, 63, (9, 0), GROUPED),
    "h200": Gpu(139.7, 989, 4.8, 450, 63, (9, 0), GROUPED),
    "b200": Gpu(178.3, 2250, 8.0, 900, 63, (10, 0), f"{GROUPED}; needs a CUDA 12.8 build or later of every package"),
}
WORDS = re.compile(r"(a100|h100|h800|h200|h20|b200)", re.IGNORECASE)


def fill_in(plan: dict[str, Any]) -> dict[str, Any]:
    """A ``plan`` section with the named GPU's memory and peak where it does not say its own."""
    if not isinstance(plan, dict) or not isinstance(gpu := GPUS.get(str(plan.get("gpu"))), Gpu):
        return plan
    known = {"gpu_memory_gib": gpu.memory_gib, "gpu_tflops": gpu.tflops}
    return plan | {key: value for key, value in known.items() if plan.get(key) is None}


def named_in(text: str) -> list[str]:
    """Names of the GPUs that a profile's words mean, such as ``gpu:a100:4``; several where the memory is not told."""
    found = WORDS.search(text)
    if not found:
        return []
    kind = found[1].lower()
    names = [name for name in GPUS if name.split("-")[0] == kind]
    size = re.search(r"(40|80) ?_?g", text, re.IGNORECASE)
    return [name for name in names if not size or len(names) == 1 or size[1] in name] or names
