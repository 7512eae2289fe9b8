"""From a ZeRO checkpoint to a Hugging Face folder with the base model's tensors, by streaming."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli, families, files
from ..data import tokenizer_files
from ..errors import BadInputError
from ..formatting import byte_size
from ..tensors import fp8_blocks, memory_bound, number_formats, swap
from ..tensors.byte_ranges import OpenFiles, allow_open_files
from ..tensors.model_writer import Checked, Plan, Progress, write_model
from ..tensors.node_shares import Part
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import Shard, StoredTensor
from ..tensors.tensor_spec import FP8_BLOCK, SCALE_SUFFIX
from . import read_ahead
from .base_model import BaseModel, companions
from .output_tensors import Rows, copied_sources, identity_of_config, output_config, output_shards, output_specs
from .release_names import prefix_of, release_sources
from .tensor_sources import Source
from .zero import Checkpoint

BYTES_PER_ELEMENT = 8  # of a work item: FP32 read, BF16, FP32 or FP8 to write
LARGE = 0.5  # of free memory: what is read of a larger checkpoint is given up at once, to leave the cache to others
SMALLEST_GAP = 1 << 20  # bytes of padding in a record that are read in any case to complete its checksum


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        dtype: ``bf16``, ``fp32`` or ``fp8``.
        mtp: ``drop`` or ``copy`` from the base, the multi-token-prediction layer, which is not trained.
        largest_shard: bytes of an output file at most; 0: the base's own files.
        memory: ``auto`` or a size.
        swap: whether a bound above the free memory may be met with swap.
        swap_folder: where a swap file goes.
        part: the share of the files to write; None for all and the complete folder.
        checksums: compare what is read with the checkpoint's own CRC-32.
        missing_from_base: take parameters that the checkpoint does not hold from the base: they were frozen.
    """

    dtype: str = "bf16"
    mtp: str = "drop"
    largest_shard: int = 5_000_000_000
    memory: str = "auto"
    workers: int = 0
    replace: bool = False
    swap: bool = False
    swap_folder: Path = Path("/var/tmp")
    part: Part | None = None
    checksums: bool = True
    missing_from_base: bool = False


@dataclass(frozen=True)
class Conversion:
    """A conversion ready to run: where each tensor comes from and what the files will look like."""

    checkpoint: Checkpoint
    base: BaseModel
    sources: dict[str, Source]
    restored: list[str]
    shards: list[Shard]
    plan: Plan
    options: Options
    memory: memory_bound.Memory
    buffers: memory_bound.Buffers

    @property
    def parameters(self) -> int:
        return sum(np.prod(source.shape, dtype=np.int64).item() for source in self.sources.values())

    @property
    def bytes_to_read(self) -> int:
        return sum(source.stored_bytes for source in self.sources.values())

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.size for shard in self.shards)


def restore_biases(sources: dict[str, Source], base: BaseModel) -> list[str]:
    """Take the router's untrained biases from the base where training kept them only in BF16.

    DeepSpeed up to 0.18 rounds buffers to BF16, and the original guide holds the bias as a BF16 parameter; the release
    has FP32. Only a bias that equals the base's after rounding is replaced (in ``sources``): nothing trained is lost.

    Returns:
        Names of the replaced tensors.
    """
    restored, bias = [], families.of(base.config).CORRECTION_BIAS
    with OpenFiles() as opened:
        for name, source in sources.items():
            stored = base.tensors[name]
            unrounded = isinstance(source.parameter, StoredTensor) and source.dtype == "F32"
            if not name.endswith(bias) or stored.spec.dtype != "F32" or unrounded:
                continue
            expected = opened.read(stored.file, stored.offset, np.float32, stored.spec.elements)
            found = source.read(opened, 0, stored.spec.elements)
            rounded, _ = number_formats.convert(found, source.dtype, "BF16")
            if np.array_equal(rounded, number_formats.float32_to_bf16(expected)):
                sources[name] = Source(stored, 0, stored.spec.shape)
                restored.append(name)
    return restored


def copy_companions(base: BaseModel, config: dict[str, Any], folder: Path) -> None:
    """Put ``config.json`` and the base's tokenizer and generation files into a model folder.

    Of ``tiktoken.model`` a ``tokenizer.json`` with the same ids is made, which servers read without code of the folder.
    """
    made = {}
    if tokenizer_files.vocabulary_file(base.folder).name == tokenizer_files.RANKS:
        made["tokenizer.json"] = tokenizer_files.tokenizer_text(base.folder).encode()
        made[tokenizer_files.CONFIG] = tokenizer_files.served_config(base.folder)
    for name, content in made.items():
        with files.atomic_open(folder / name, "wb") as stream:
            stream.write(content)
    for path in companions(base.folder):
        if path.name in made or (made and (path.name == tokenizer_files.RANKS or path.suffix == ".py")):
            continue
        with files.atomic_open(folder / path.name, "wb") as stream:
            stream.write(path.read_bytes())
    files.write_json(folder / "config.json", config)


def trained_sources(
    checkpoint: Checkpoint, base: BaseModel, missing_from_base: bool = False
) -> tuple[dict[str, Source], list[str], list[str]]:
    """Source of every tensor of the base that the checkpoint holds.

    Returns:
        Sources; which of them are the base's own (see ``restore_biases``); names that the checkpoint does not hold.
    """
    wanted = {name: base.expected[name] for name in base.weights(mtp=False)}
    sources = release_sources(checkpoint, wanted, missing_from_base)
    return sources, restore_biases(sources, base), [name for name in wanted if name not in sources]


def check_rows(rows: Rows, buffers: memory_bound.Buffers) -> None:
    """
    Raises:
        BadInputError: a work item must be larger than the memory bound lets it be.
    """
    if rows.largest > buffers.chunk:
        raise BadInputError(
            f"quantising needs {byte_size(rows.largest * BYTES_PER_ELEMENT)} for each of {buffers.workers} threads, "
            f"the memory bound leaves {byte_size(buffers.chunk * BYTES_PER_ELEMENT)}",
            "raise --memory, or give fewer --workers",
        )


def prepare(checkpoint: Checkpoint, base: BaseModel, output: Path, options: Options) -> Conversion:
    """Decide everything before the first byte is read; says where prefix and layout were taken from.

    Raises:
        BadInputError: checkpoint and base do not fit, or the memory bound is impossible.
    """
    specs = output_specs(base, options.dtype, options.mtp)
    sources, restored, frozen = trained_sources(checkpoint, base, options.missing_from_base)
    copied = [name for name in base.weights(options.mtp == "copy") if name not in base.expected]
    sources |= copied_sources(base, specs, copied + frozen)
    shards = output_shards(base, specs, options.largest_shard)
    rows = Rows(specs, sources)
    found = memory_bound.measure()
    largest = max(spec.elements for spec in specs.values())
    buffers = memory_bound.plan_buffers(
        options.memory, options.workers, BYTES_PER_ELEMENT, found, largest=largest, swap=options.swap
    )
    check_rows(rows, buffers)
    allow_open_files(checkpoint.file_count)

    if checkpoint.marker:
        cli.say(f"checkpoint: committed by run {checkpoint.marker.run_id} at step {checkpoint.step}")
    else:
        cli.say(
            f"checkpoint: no commit marker; accepted after checking all {checkpoint.world_size} ranks' files, "
            f"step {checkpoint.step}, parameter prefix {prefix_of(checkpoint)!r}"
        )
    if base.mtp:
        fate = "copied from the base" if copied else "dropped"
        cli.say(f"the base's {len(base.mtp)} tensors of the multi-token-prediction layer were not trained: {fate}")
    if restored:
        cli.say(f"{len(restored)} router biases lost precision in training; taken unchanged from the base")
    if frozen:
        cli.say(f"{len(frozen)} parameters are not in the checkpoint (first {frozen[0]}); taken from the base: frozen")
    beyond = f"{byte_size(buffers.beyond)} of them in swap" if buffers.beyond else "no swap used"
    cli.say(f"memory: {found}; up to {byte_size(buffers.size)} of buffers in {buffers.workers} threads, {beyond}")

    config = output_config(base, options.dtype, options.mtp)
    identity = {
        "made_by": "convert_checkpoint",
        "checkpoint": checkpoint.fingerprint,
        "step": checkpoint.step,
        "base": base.fingerprint,
        "dtype": options.dtype,
        "mtp": options.mtp,
        "layout": files.digest([[shard.name, shard.header[8:].decode()] for shard in shards]),
        "from_base": restored + frozen,
    } | identity_of_config(base, config, options.dtype, options.mtp)
    plan = Plan(
        output=output,
        identity=identity,
        shards=shards,
        chunk=buffers.chunk,
        row=rows,
        workers=buffers.workers,
        finish=lambda folder: copy_companions(base, config, folder),
        replace=options.replace,
        part=options.part,
    )
    return Conversion(checkpoint, base, sources, restored, shards, plan, options, found, buffers)


def checked_files(checkpoint: Checkpoint) -> set[Path]:
    """The ranks' files that hold the FP32 master weights, and those of the buffers (the router's biases)."""
    master_weights = {path for p in checkpoint.parameters.values() if p.dtype == "F32" for path in p.files}
    return master_weights | {buffer.file for buffer in checkpoint.buffers.values()}


def run(conversion: Conversion) -> tuple[Progress, int, float]:
    """Write the model; returns what was done, the bytes read and the seconds it took.

    Raises:
        BadInputError, CrashError: see ``model_writer.write_model``; a checkpoint file that ends early or is damaged.
    """
    checkpoint, options, sources = conversion.checkpoint, conversion.options, conversion.sources
    checked = checked_files(checkpoint) if options.checksums else set()
    drop = conversion.bytes_to_read > LARGE * conversion.memory.usable
    started = time.monotonic()
    with (
        swap.provided(conversion.buffers.beyond, conversion.plan.output, options.swap_folder, conversion.memory),
        read_ahead.CheckedFiles(checked, drop) as opened,
    ):

        def expect(name: str, start: int, count: int) -> None:
            source = sources[name]
            if isinstance(source.parameter, Partitioned):
                read_ahead.expect(opened, source.parameter.pieces(source.start + start, count), source.dtype)

        def produce(name: str, start: int, count: int) -> tuple[Any, int]:
            opened.reading(name)
            return make(conversion.plan.row, name, start, sources[name].read(opened, start, count))

        def check(notes: dict[str, Any]) -> Checked:
            padding = 4 * checkpoint.world_size * len(checkpoint.parameters)
            return read_ahead.check_notes(checkpoint.folder, notes, max(SMALLEST_GAP, padding))

        plan = dataclasses.replace(
            conversion.plan, expect=expect, note=opened.note, check=check if options.checksums else None
        )
        progress = write_model(plan, produce)
    return progress, opened.bytes_read, time.monotonic() - started


def make(rows: Rows, name: str, start: int, values: np.ndarray) -> tuple[Any, int]:
    """What is written of one work item, and the number of non-finite values in it; see ``model_writer.Produce``.

    Args:
        values: elements ``start`` … of the tensor's source, as bits of the source's dtype.
    """
    dtype = rows.sources[name].dtype
    if not rows.quantises(name):
        return number_formats.convert(values, dtype, rows.specs[name].dtype)
    columns = rows.specs[name].shape[1]
    result = fp8_blocks.quantize(number_formats.to_float32(values, dtype).reshape(-1, columns))
    band = start // (columns * FP8_BLOCK)
    factors = name + SCALE_SUFFIX
    return [(name, start, result.codes), (factors, band * result.factors.shape[1], result.factors)], result.non_finite
