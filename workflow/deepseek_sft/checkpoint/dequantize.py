"""From the release's FP8 block format to BF16, by streaming, without a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cli, files
from . import memory
from .base_model import BaseModel
from .byte_ranges import OpenFiles, allow_open_files
from .convert import copy_companions, make
from .model_writer import Plan, Progress, write_model
from .outputs import Rows, copied_sources, output_config, output_shards, output_specs
from .sizes import show_size

BYTES_PER_ELEMENT = 11  # of a work item: code, its value, the result


@dataclass(frozen=True)
class Options:
    """See ``convert.Options``."""

    mtp: str = "drop"
    largest_shard: int = 5_000_000_000
    memory: str = "auto"
    workers: int = 0
    replace: bool = False


def dequantize(base: BaseModel, output: Path, options: Options) -> Progress:
    """Write the BF16 model of an FP8 base to ``output``; goes on after a kill.

    Raises:
        BadInputError, CrashError: see ``model_writer.write_model``.
    """
    specs = output_specs(base, "bf16", options.mtp)
    sources = copied_sources(base, specs, list(specs))
    rows = Rows(specs, sources)
    quantised = sum(source.factors is not None for source in sources.values())
    shards = output_shards(base, specs, options.largest_shard)
    found = memory.measure()
    buffers = memory.plan_buffers(options.memory, options.workers, BYTES_PER_ELEMENT, found)
    allow_open_files(len(base.files) + len(shards))
    cli.say(f"{base.folder} is FP8 ({quantised} matrices): dequantising to {output}")
    cli.say(f"memory: {found}; up to {show_size(buffers.size)} of buffers in {buffers.workers} threads, no swap used")
    config = output_config(base.config, "bf16", options.mtp)
    plan = Plan(
        output=output,
        identity={
            "made_by": "prepare_model",
            "base": base.fingerprint,
            "dtype": "bf16",
            "mtp": options.mtp,
            "layout": files.digest([[shard.name, shard.header[8:].decode()] for shard in shards]),
        },
        shards=shards,
        chunk=buffers.chunk,
        row=rows,
        workers=buffers.workers,
        finish=lambda folder: copy_companions(base, config, folder),
        replace=options.replace,
    )
    with OpenFiles() as opened:

        def produce(name: str, start: int, count: int) -> tuple[Any, int]:
            return make(rows, name, start, sources[name].read(opened, start, count))

        return write_model(plan, produce)
