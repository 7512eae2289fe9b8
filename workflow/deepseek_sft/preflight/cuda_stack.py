"""Whether this environment can run on this node's driver and GPUs: packages, CUDA of the torch build, capability."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from . import gpu_state
from .findings import Finding
from .settings import Needs

# Oldest driver branch on Linux by CUDA's major version (CUDA Toolkit release notes, minor-version compatibility).
LEAST_DRIVER = {12: 525, 13: 580}
LEAST_CAPABILITY = {12: (5, 0), 13: (7, 5)}
BFLOAT16 = (8, 0)
AMPERE = "works without grouped products of experts and without cuDNN's unpadded attention; no FP8 arithmetic"


def built_for(folder: Path | None = None) -> int | None:
    """CUDA's major version that torch was built for, 0 for a CPU build; None where it does not say.

    Read from its ``version.py``, which every build has (PyPI's, conda's, a container's): importing takes seconds.

    Args:
        folder: of the package; None looks for the installed one.
    """
    if folder is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.origin:
            return None
        folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*(?:None|['\"](\d+)\.)", text, re.MULTILINE)
    return int(found[1] or 0) if found else None


def compatibility_driver(paths: str) -> int | None:
    """Branch of the first forward-compatibility libcuda in ``LD_LIBRARY_PATH``, from its file's name."""
    for folder in filter(None, paths.split(":")):
        library = Path(folder) / "libcuda.so.1"
        if library.exists() and (found := re.fullmatch(r"libcuda\.so\.(\d+)\.[\d.]+", library.resolve().name)):
            return int(found[1])
    return None


def problems(cuda: int, driver: str, capability: tuple[int, int] | None, compatibility: int | None) -> list[str]:
    """What of driver and GPU does not carry a build for this CUDA.

    Args:
        driver: as nvidia-smi says it, such as ``550.54.15``.
        capability: lowest of the node's GPUs.
        compatibility: branch of the forward-compatibility libcuda in use.
    """
    found = []
    branch = re.match(r"\d+", driver)
    counted = compatibility or (int(branch[0]) if branch else None)
    least = LEAST_DRIVER.get(cuda)
    if counted is None:
        found.append(f"the driver's version {driver!r} cannot be read")
    elif least and counted < least:
        found.append(
            f"torch is built for CUDA {cuda}, which needs driver {least} or newer; "
            + (f"cuda_compat brings {counted}" if compatibility else f"this is {driver}")
            + "; renew the driver, or set envs.train.cuda_compat (envs/README.md)"
        )
    lowest = max(BFLOAT16, LEAST_CAPABILITY.get(cuda, BFLOAT16))
    if capability is not None and capability < lowest:
        found.append(
            f"compute capability {capability[0]}.{capability[1]}: bfloat16 training needs 8.0 (Ampere) or newer"
        )
    return found


def gpus_and_stack(accelerator: str, wanted: int, needs: Needs, visible: str | None) -> tuple[Finding, dict[str, Any]]:
    """The check ``gpus`` with what this environment needs of the driver and of the GPUs."""
    finding, same = gpu_state.gpus(accelerator, wanted, needs, visible)
    if accelerator == "cuda" and "driver" not in same:
        return finding, same
    capabilities: list[str] = []
    if accelerator == "cuda":
        try:
            capabilities = [row[0] for row in gpu_state.query("--query-gpu=compute_cap") if row]
        except OSError:
            capabilities = []  # an old nvidia-smi; the finding says that it was not judged
    stack = check(accelerator, same.get("driver", ""), capabilities)
    if stack.passed is None:
        return finding, same
    passed = finding.passed is not False and stack.passed
    return Finding("gpus", passed, f"{finding.detail}; {stack.detail}", finding.value if passed else stack.value), same


def check(accelerator: str, driver: str, capabilities: list[str], environment: dict[str, str] | None = None) -> Finding:
    """The finding ``cuda stack`` of this node.

    Args:
        capabilities: of every GPU, as nvidia-smi says them (``9.0``).
    """
    if accelerator == "cpu":
        return Finding("cuda stack", None, "training runs on CPU")
    text = []
    cuda = built_for()
    known = [tuple(map(int, c.split("."))) for c in capabilities if re.fullmatch(r"\d+\.\d+", c)]
    lowest = min(known) if known else None
    if cuda == 0:
        text.append("torch is a build for CPUs alone")
    elif cuda is not None:
        paths = (os.environ if environment is None else environment).get("LD_LIBRARY_PATH", "")
        text += problems(cuda, driver, lowest, compatibility_driver(paths))
    if text:
        return Finding("cuda stack", False, "; ".join(text), "unfit")
    said = f"torch for CUDA {cuda}, driver {driver}"
    if cuda is None:
        said = f"torch does not say for which CUDA it was built, so driver {driver} was not judged"
    if lowest is None:
        said += "; compute capability was not judged"
    elif lowest < (9, 0):
        said += f"; compute capability {lowest[0]}.{lowest[1]}: {AMPERE}"
    return Finding("cuda stack", True, said, f"CUDA {cuda or '?'}")
