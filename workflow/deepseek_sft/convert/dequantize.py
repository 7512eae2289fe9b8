"""From a base to a BF16 model of its own, by streaming, without a GPU: FP8 blocks and INT4 groups are dequantised."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli, files
from ..errors import BadInputError
from ..formatting import byte_size
from ..tensors import memory_bound
from ..tensors.byte_ranges import OpenFiles, allow_open_files
from ..tensors.model_writer import Plan, Progress, write_model
from ..tensors.tensor_spec import SCALE_SUFFIX
from .base_model import BaseModel
from .convert import copy_companions, make
from .output_tensors import Rows, copied_sources, identity_of_config, output_config, output_shards, output_specs

SHOWN = 5  # tensors named in a message
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
    """Write the BF16 model of a base to ``output``, FP8 or cut (``cut_base``); goes on after a kill.

    Raises:
        BadInputError, CrashError: see ``model_writer.write_model``; a value is not finite, naming the tensors.
    """
    _check_factors(base)
    specs = output_specs(base, "bf16", options.mtp)
    sources = copied_sources(base, specs, list(specs))
    rows = Rows(specs, sources)
    quantised = sum(source.factors is not None for source in sources.values())
    shards = output_shards(base, specs, options.largest_shard)
    found = memory_bound.measure()
    buffers = memory_bound.plan_buffers(options.memory, options.workers, BYTES_PER_ELEMENT, found)
    allow_open_files(len(base.files) + len(shards))
    if quantised:
        form = "INT4" if base.groups else "FP8"
        cli.say(f"{base.folder} is {form} ({quantised} matrices): dequantising to {output}")
    else:
        cli.say(f"writing {base.config['num_hidden_layers']} layers of {base.folder} to {output}")
    cli.say(f"memory: {found}; up to {byte_size(buffers.size)} of buffers in {buffers.workers} threads, no swap used")
    config = output_config(base, "bf16", options.mtp)
    plan = Plan(
        output=output,
        identity={
            "made_by": "prepare_model",
            "base": base.fingerprint,
            "dtype": "bf16",
            "mtp": options.mtp,
            "layout": files.digest([[shard.name, shard.header[8:].decode()] for shard in shards]),
        }
        | identity_of_config(base, config, "bf16", options.mtp),
        shards=shards,
        chunk=buffers.chunk,
        row=rows,
        workers=buffers.workers,
        finish=lambda folder: copy_companions(base, config, folder),
        replace=options.replace,
    )
    with OpenFiles() as opened:

        def produce(name: str, start: int, count: int) -> tuple[Any, int]:
            made, non_finite = make(rows, name, start, sources[name].read(opened, start, count))
            if non_finite:
                raise _not_finite(base, {name: non_finite})
            return made, non_finite

        progress = write_model(plan, produce)
    if progress.non_finite:  # of files that an earlier version finished
        raise _not_finite(base, progress.non_finite)
    return progress


def _not_finite(base: BaseModel, found: dict[str, int]) -> BadInputError:
    """A release has no such values: a code or a block's factor is damaged."""
    names = [f"{name} ({count} values, {base.tensors[name].file.name})" for name, count in sorted(found.items())]
    return BadInputError(
        f"{base.folder}: infinite or not a number once dequantised: {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else ""),
        "the file or its scales are damaged: fetch them again, compare with the checksums of the release",
    )


def _check_factors(base: BaseModel) -> None:
    """
    Raises:
        BadInputError: a block's factor is not finite, naming all such tensors before anything is written.
    """
    found = {}
    with OpenFiles() as opened:
        for name, tensor in base.tensors.items():
            if name.endswith(SCALE_SUFFIX) and tensor.spec.dtype == "F32":
                factors = opened.read(tensor.file, tensor.offset, np.float32, tensor.spec.elements)
                if wrong := int(np.count_nonzero(~np.isfinite(factors))):
                    found[name] = wrong
    if found:
        raise _not_finite(base, found)
