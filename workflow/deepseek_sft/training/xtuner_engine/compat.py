"""Import-time shims that let the unmodified xtuner 0.2.0 and DeepSpeed 0.19 run text training anywhere.

Each applies only where the real thing is missing; docs/training.md lists them with their reasons. Import this module's
``install`` before anything of xtuner.
"""

import datetime
import functools
import importlib
import sys
import types

VISION_DATASETS = {
    # xtuner.dataset imports its vision datasets eagerly; text needs none of them.
    "torchvision": ("xtuner.dataset.internvl_dataset", ("InternVL_V1_5_Dataset",)),
    "skimage": (
        "xtuner.dataset.refcoco_json",
        ("InvRefCOCOJsonDataset", "RefCOCOJsonDataset", "RefCOCOJsonEvalDataset"),
    ),
}
# mmengine enters them into its registry whether or not they are used; DeepSpeed 0.19 has them no more.
ONEBIT, ONEBIT_OPTIMIZERS = "deepspeed.runtime.fp16.onebit", ("OnebitAdam", "OnebitLamb", "ZeroOneAdam")


def install(accelerator: str) -> list[str]:
    """Apply the shims that this environment needs and return their names."""
    applied = []
    for package, (module, names) in VISION_DATASETS.items():
        if not _imports(package) and module not in sys.modules:
            stub = types.ModuleType(module)
            stub.__dict__.update(dict.fromkeys(names))
            sys.modules[module] = stub
            applied.append(module)
    if not _imports(ONEBIT) and ONEBIT not in sys.modules:
        stub = types.ModuleType(ONEBIT)
        stub.__dict__.update({name: type(name, (), {"__module__": ONEBIT}) for name in ONEBIT_OPTIMIZERS})
        sys.modules[ONEBIT] = stub
        applied.append(ONEBIT)
    if accelerator == "cpu":
        import deepspeed.ops

        # A shared-memory all-reduce that DeepSpeed compiles at start (45 s, needs g++); gloo is as fast on one machine.
        if deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm"):
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            applied.append("deepspeed_shm_comm")
        from deepspeed.accelerator import get_accelerator

        # Asked in every reduce-scatter, and answered by a process that looks for NUMA nodes.
        accelerator = get_accelerator()
        accelerator.device_count = functools.cache(accelerator.device_count)
    return applied


def limit_every_group(timeout: datetime.timedelta) -> None:
    """Give process groups that are made without a time-out this one, and not torch's 10 minutes (NCCL) or 30 (gloo).

    DeepSpeed copies the group of all ranks, over which ZeRO-3 gathers and reduces, and xtuner makes its own, both
    without a time-out: NCCL would end a rank long before the watchdog, which knows more, may speak.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except Exception:  # ImportError, or RuntimeError of a torchvision built for another torch
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
        return False
    return True
