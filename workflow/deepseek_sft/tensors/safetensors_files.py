"""Reading and laying out safetensors files with byte ranges only, so that no tensor need ever be whole in memory.

Format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
``{name: {"dtype", "shape", "data_offsets": [start, end]}}`` with offsets counted from the end of the header, the data.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..errors import BadInputError
from .tensor_spec import INT4, SCALE_SUFFIX, TensorSpec

ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
FORMATS_KNOWN = ", ".join(ITEM_SIZES)
LONGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
SINGLE_FILE = "model.safetensors"  # of a model without index
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, absolute byte offset, and what it is."""

    file: Path
    offset: int
    spec: TensorSpec

    @property
    def bytes(self) -> int:
        return self.spec.elements // 2 if self.spec.dtype == INT4 else self.spec.elements * ITEM_SIZES[self.spec.dtype]


@dataclass(frozen=True)
class Shard:
    """One output file: its header and the absolute offset of each of its tensors."""

    name: str
    header: bytes
    tensors: dict[str, StoredTensor]
    size: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file and check it against the file's size.

    Returns:
        The tensors in the order of their offsets.

    Raises:
        BadInputError: missing, cut, or malformed, naming the file and what is wrong in it.
    """
    files.refuse_pointer(path)
    try:
        with open(path, "rb") as stream:
            size = path.stat().st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length < 2 or length > min(LONGEST_HEADER, size - 8):
                raise BadInputError(f"{path} is cut or is no safetensors file ({size} bytes)", "fetch this file again")
            entries = json_files.parse(stream.read(length))
    except OSError as error:
        raise BadInputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BadInputError(f"{path}: the safetensors header is no JSON: {error}", "fetch this file again") from None
    try:
        tensors, end = _stored(path, entries, 8 + length)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadInputError(
            f"{path}: the safetensors header is malformed: {error!r}", "fetch this file again"
        ) from None
    if end != size:
        raise BadInputError(f"{path} has {size} bytes, its header describes {end}", "fetch this file again")
    return tensors


def _stored(path: Path, entries: dict[str, Any], data_start: int) -> tuple[dict[str, StoredTensor], int]:
    tensors, position = {}, 0
    described = sorted(
        ((name, entry) for name, entry in entries.items() if name != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    )
    for name, entry in described:
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
        start, end = entry["data_offsets"]
        if isinstance(dtype, str) and dtype not in ITEM_SIZES:
            raise BadInputError(
                f"{path}: {name} is of dtype {dtype}, which this program does not read (known: {FORMATS_KNOWN})",
                "use the official release, or a BF16 copy of the model",
            )
        if any(type(n) is not int or n < 0 for n in (*shape, start, end)):  # true is 1 to isinstance
            raise ValueError(f"shape of {name}: {shape}")
        if start != position or end - start != math.prod(shape) * ITEM_SIZES[dtype]:
            raise ValueError(f"offsets of {name}: {start}, {end}")
        tensors[name] = StoredTensor(path, data_start + start, TensorSpec(shape, dtype))
        position = end
    return tensors, data_start + position


def lay_out(tensors: Iterable[tuple[str, TensorSpec]], largest_shard: int) -> list[Shard]:
    """Distribute tensors in the given order over files of at most ``largest_shard`` data bytes.

    The block factors that follow an FP8 tensor stay in its file. A tensor larger than that gets a file of its own. A
    single file is called ``model.safetensors``.
    """
    units: list[dict[str, TensorSpec]] = []
    for name, spec in tensors:
        if units and name.removesuffix(SCALE_SUFFIX) in units[-1]:
            units[-1][name] = spec
        else:
            units.append({name: spec})
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for unit in units:
        size = sum(spec.elements * ITEM_SIZES[spec.dtype] for spec in unit.values())
        if groups[-1] and filled + size > largest_shard:
            groups.append({})
            filled = 0
        groups[-1] |= unit
        filled += size
    if len(groups) == 1:
        return [_shard(SINGLE_FILE, groups[0])]
    return [_shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def lay_out_like(tensors: Iterable[tuple[str, TensorSpec]], places: Mapping[str, str]) -> list[Shard]:
    """Distribute tensors over the files that another model keeps them in.

    Args:
        places: tensor → file name there; block factors stay with their tensor.
    """
    groups: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in tensors:
        groups.setdefault(places[name.removesuffix(SCALE_SUFFIX)], {})[name] = spec
    return [_shard(file, groups[file]) for file in sorted(groups)]


def _shard(name: str, specs: dict[str, TensorSpec]) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor, spec in specs.items():
        end = position + spec.elements * ITEM_SIZES[spec.dtype]
        entries[tensor] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensors, size = _stored(Path(name), entries, len(header))
    return Shard(name, header, tensors, size)


def index_of(shards: list[Shard]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``; ``total_size`` counts data bytes, as transformers does."""
    weight_map = {tensor: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.bytes for shard in shards for tensor in shard.tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
