"""What ``convert_checkpoint.py --dry-run`` says: sizes, files, shares, and how long it will take here."""

import json
from pathlib import Path
from typing import Any

from ..formatting import byte_size
from ..tensors.node_shares import Part, share
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import ITEM_SIZES
from . import disk_bandwidth
from .convert import Conversion

MOST_PROBED = 64  # parameters


def _probed_ranges(conversion: Conversion) -> list[tuple[Path, int, int]]:
    """Some of the largest ranges of the master weights, from all over the model and the ranks."""
    found = {(p.skip, p.first): p for p in conversion.checkpoint.parameters.values() if isinstance(p, Partitioned)}
    parameters = sorted(found.values(), key=lambda p: -p.partition)[:MOST_PROBED]
    ranges = []
    for number, parameter in enumerate(parameters):
        pieces = list(parameter.pieces(0, parameter.elements))
        path, offset, length = pieces[number * len(pieces) // len(parameters)]
        ranges.append((path, offset, ITEM_SIZES[parameter.dtype] * length))
    return ranges


def describe(conversion: Conversion, shares: int) -> dict[str, Any]:
    """The plan as JSON, after a measurement of about five seconds.

    Args:
        shares: nodes that write at the same time. They are taken to be as fast as this one, together.
    """
    speed = disk_bandwidth.measure(
        _probed_ranges(conversion), conversion.plan.output, conversion.bytes_to_write, conversion.buffers.workers
    )
    sizes = [sum(s.size for s in share(conversion.shards, Part(k, shares))) for k in range(1, shares + 1)]
    largest = max(sizes) / sum(sizes)
    bytes_to_read, bytes_to_write = conversion.bytes_to_read, conversion.bytes_to_write
    seconds = speed.seconds(int(bytes_to_read * largest), int(bytes_to_write * largest))
    return {
        "step": conversion.checkpoint.step,
        "world_size": conversion.checkpoint.world_size,
        "parameters": conversion.parameters,
        "tensors": len(conversion.sources),
        "bytes_to_read": bytes_to_read,
        "bytes_to_write": bytes_to_write,
        "memory_bytes": conversion.buffers.size,
        "workers": conversion.buffers.workers,
        "measured_bytes_per_second": {
            "read": speed.read and round(speed.read),
            "write": speed.write and round(speed.write),
            "convert": round(speed.convert),
        },
        "seconds": seconds and [round(seconds[0], 1), round(seconds[1], 1)],
        "bytes_of_each_share": sizes,
        "shards": [shard.name for shard in conversion.shards],
        "identity": conversion.plan.identity,
    }


def summary(plan: dict[str, Any]) -> str:
    """The plan in two lines for people."""
    speed, seconds, shares = plan["measured_bytes_per_second"], plan["seconds"], len(plan["bytes_of_each_share"])
    rates = ", ".join(f"{name} {byte_size(rate)}/s" if rate else f"{name} unknown" for name, rate in speed.items())
    time = "time unknown: the output's folder cannot be written, or the checkpoint is too small to measure"
    if seconds:
        time = f"{_duration(seconds[0])} to {_duration(seconds[1])}"
        time += f" on {shares} nodes, each as fast as this one" if shares > 1 else ""
    return (
        f"plan: {plan['tensors']:,} tensors in {len(plan['shards'])} files; reads {byte_size(plan['bytes_to_read'])}, "
        f"writes {byte_size(plan['bytes_to_write'])}, buffers {byte_size(plan['memory_bytes'])}\n"
        f"measured here: {rates}; {time}"
    )


def text(plan: dict[str, Any]) -> str:
    return json.dumps(plan, indent=2)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
