"""From the release's FP8 block format to BF16, by streaming, without a GPU.

A quantised matrix is stored as FP8 (E4M3) beside ``<name>_scale_inv``: one FP32 factor per block of 128 × 128. The
value is code × factor in FP32, rounded to BF16, as in DeepSeek's ``inference/fp8_cast_bf16.py``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli, files
from ..model import release
from . import memory, number_formats
from .base_model import BaseModel
from .byte_ranges import OpenFiles, allow_open_files
from .convert import copy_companions
from .model_writer import Plan, Progress, write_model
from .number_formats import WIDTHS
from .safetensors_files import ITEM_SIZES, lay_out
from .sizes import show_size

BYTES_PER_ELEMENT = 11  # of a work item: code, its value, its factor, the result


@dataclass(frozen=True)
class Options:
    largest_shard: int = 5_000_000_000
    memory: str = "auto"
    workers: int = 0
    replace: bool = False


def output_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of the BF16 model: without FP8 and without the multi-token-prediction layer."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**kept, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 0}


def dequantized_rows(opened: OpenFiles, base: BaseModel, name: str, start: int, count: int) -> np.ndarray:
    """FP32 values of whole rows of a quantised matrix.

    Args:
        start, count: elements, multiples of the row length.

    Returns:
        float32 [count].
    """
    stored, scale = base.tensors[name], base.tensors[name + release.SCALE_SUFFIX]
    columns = stored.spec.shape[1]
    factors_per_row = scale.spec.shape[1]
    first, last = start // columns, (start + count) // columns
    codes = opened.read(stored.file, stored.offset + start, np.uint8, count)
    top, bottom = first // release.FP8_BLOCK, -(-last // release.FP8_BLOCK)
    offset = scale.offset + top * factors_per_row * 4
    factors = opened.read(scale.file, offset, np.float32, (bottom - top) * factors_per_row)
    rows = np.arange(first, last) // release.FP8_BLOCK - top
    by_row = factors.reshape(-1, factors_per_row)[rows]
    values = np.take(number_formats.E4M3_VALUES, codes).reshape(-1, columns)
    values *= np.repeat(by_row, release.FP8_BLOCK, axis=1)[:, :columns]
    return values.reshape(-1)


def dequantize(base: BaseModel, output: Path, options: Options) -> Progress:
    """Write the BF16 model of an FP8 base to ``output``; goes on after a kill.

    Raises:
        BadInputError, CrashError: see ``model_writer.write_model``.
    """
    quantised = {name for name in base.expected if base.tensors[name].spec.dtype == "F8_E4M3"}
    shards = lay_out(base.ordered, options.largest_shard)
    found = memory.measure()
    buffers = memory.plan_buffers(options.memory, options.workers, BYTES_PER_ELEMENT, found)
    allow_open_files(len(base.files) + len(shards))
    cli.say(f"{base.folder} is FP8 ({len(quantised)} matrices): dequantising to {output}")
    cli.say(f"memory: {found}; up to {show_size(buffers.size)} of buffers in {buffers.workers} threads, no swap used")
    config = output_config(base.config)
    plan = Plan(
        output=output,
        identity={
            "made_by": "prepare_model",
            "base": base.fingerprint,
            "dtype": "bf16",
            "mtp": "drop",
            "layout": files.digest([[shard.name, shard.header[8:].decode()] for shard in shards]),
        },
        shards=shards,
        chunk=buffers.chunk,
        row=lambda name: base.expected[name].shape[1] if name in quantised else 1,
        workers=buffers.workers,
        finish=lambda folder: copy_companions(base, config, folder),
        replace=options.replace,
    )
    dtypes = {name: spec.dtype for name, spec in base.ordered}
    with OpenFiles() as opened:

        def produce(name: str, start: int, count: int) -> tuple[np.ndarray, int]:
            if name in quantised:
                return number_formats.convert(dequantized_rows(opened, base, name, start, count), "F32", "BF16")
            stored = base.tensors[name]
            dtype = stored.spec.dtype
            values = opened.read(stored.file, stored.offset + start * ITEM_SIZES[dtype], WIDTHS[dtype], count)
            return number_formats.convert(values, dtype, dtypes[name])

        return write_model(plan, produce)
