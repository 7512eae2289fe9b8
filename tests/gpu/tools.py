"""nvidia-smi and NVML as preflight reads them, and NCCL's flight recorder."""

import dataclasses
import os
import pickle
import shutil

import torch
import torch.distributed as dist
from check import Place, Row

from deepseek_sft.preflight import gpu_state
from deepseek_sft.preflight.settings import Needs
from deepseek_sft.training import device_health, watchdog


def rows(place: Place) -> list[Row]:
    return [smi(place), nvml(place), flight_recorder(place)]


def smi(place: Place) -> Row:
    name = "nvidia-smi, as preflight reads it"
    if place.device == "cpu":
        there = shutil.which("nvidia-smi") is not None
        return Row(name, None, {"not judged": "no GPU is asked for", "nvidia-smi": there})
    fields = gpu_state.query(f"--query-gpu={','.join(gpu_state.FIELDS)}")
    finding, _ = gpu_state.gpus("cuda", torch.cuda.device_count(), Needs(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    row = dict(zip(gpu_state.FIELDS, fields[0], strict=True))
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
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    found = device_health.look_with_nvml(pynvml, uuid)()
    figures = dataclasses.asdict(found) | {"throttling": device_health.words(found.reasons)}
    return Row(name, found.most_mhz > 0, figures)


def flight_recorder(place: Place) -> Row:
    """After one collective the recorder must hold it; gloo's recorder, where torch has one, stands in on a CPU."""
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "200")
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")
    name = "the flight recorder holds the last collective"
    backend = "nccl" if place.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place.work / 'store'}", rank=0, world_size=1)
    value = torch.ones(4, device=place.device)
    dist.all_reduce(value)
    if place.device == "cuda":
        torch.cuda.synchronize()
    trace = place.work / "flight-recorder.pickle"
    told = watchdog.dump_flight_recorder(trace)
    dist.destroy_process_group()
    if not trace.exists():
        return Row(name, None if told == watchdog.NO_RECORDER else False, {"not judged": told})
    names = [str(entry.get("profiling_name")) for entry in pickle.loads(trace.read_bytes()).get("entries", [])]
    good = any("all_reduce" in one for one in names)
    return Row(name, good if place.device == "cuda" or names else None, {"entries": len(names), "told": told})
