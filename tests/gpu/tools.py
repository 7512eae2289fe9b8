"""nvidia-smi and NVML as preflight reads them, and NCCL's flight recorder."""

import os
import pickle
import shutil

import torch
import torch.distributed as dist
from check import Place, Row

from deepseek_sft.preflight import gpus
from deepseek_sft.preflight.settings import Needs


def rows(place: Place) -> list[Row]:
    return [smi(place), nvml(place), flight_recorder(place)]


def smi(place: Place) -> Row:
    name = "nvidia-smi, as preflight reads it"
    if place.device == "cpu":
        there = shutil.which("nvidia-smi") is not None
        return Row(name, None, {"not judged": "no GPU is asked for", "nvidia-smi": there})
    fields = gpus.query(f"--query-gpu={','.join(gpus.FIELDS)}")
    finding, _ = gpus.gpus("cuda", torch.cuda.device_count(), Needs(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    row = dict(zip(gpus.FIELDS, fields[0], strict=True))
    good = finding.passed is not None and row["memory.total"].isdigit() and "." in row["driver_version"]
    return Row(name, good, {"detail": finding.detail, "driver": row["driver_version"], "MiB": row["memory.total"]})


def nvml(place: Place) -> Row:
    name = "NVML: clocks, throttling, ECC"
    if place.device == "cpu":
        return Row(name, None, {"not judged": "no GPU is asked for"})
    try:
        import pynvml
    except ModuleNotFoundError:
        return Row(name, None, {"not judged": "no pynvml here"})
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    clock = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
    reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    figures = {"SM MHz": clock, "throttling": hex(reasons), "W": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000}
    try:
        kind, counter = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        figures["ECC"] = pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter)
    except pynvml.NVMLError as caught:
        figures["ECC"] = str(caught)
    return Row(name, clock > 0, figures)


def flight_recorder(place: Place) -> Row:
    """After one collective the recorder must hold it; gloo's recorder, where torch has one, stands in on a CPU."""
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "200")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")
    name, functions = "the flight recorder holds the last collective", torch._C._distributed_c10d
    dumps = ("_dump_nccl_trace", "_dump_fr_trace") if place.device == "cuda" else ("_dump_fr_trace",)
    dump = next((getattr(functions, one) for one in dumps if hasattr(functions, one)), None)
    if dump is None:
        return Row(name, None, {"not judged": "this torch has none for this device"})
    backend = "nccl" if place.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place.work / 'store'}", rank=0, world_size=1)
    value = torch.ones(4, device=place.device)
    dist.all_reduce(value)
    if place.device == "cuda":
        torch.cuda.synchronize()
    entries = pickle.loads(dump()).get("entries", [])
    dist.destroy_process_group()
    names = [str(entry.get("profiling_name")) for entry in entries]
    good = any("all_reduce" in one for one in names)
    return Row(
        name, good if place.device == "cuda" or names else None, {"entries": len(names), "function": dump.__name__}
    )
