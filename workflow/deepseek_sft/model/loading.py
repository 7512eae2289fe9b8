"""Fill a training model from a folder in the release's format; under ZeRO-3 each rank reads its own slices only."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from .. import json_files
from ..errors import BadInputError
from ..tensors.tensor_spec import FP8_BLOCK, SCALE_SUFFIX
from .experts import MixtureOfExperts

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class ReleaseReader:
    """Reads slices of tensors by name; files are opened once and stay memory-mapped.

    ``bytes_read`` counts what was asked for; the kernel reads whole pages of 4 KiB.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_read = 0
        self._handles: dict[str, safe_open] = {}
        try:
            if (folder / INDEX).exists():
                self.file_of = json_files.read(folder / INDEX, {"weight_map": dict})["weight_map"]
            else:
                self.file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise BadInputError(f"base model {folder} cannot be read: {error}", "run prepare_model again") from None

    def _open(self, name: str) -> safe_open:
        if name not in self._handles:
            self._handles[name] = safe_open(self.folder / name, framework="pt")
        return self._handles[name]

    def slice_of(self, name: str):
        """A safetensors slice object of a tensor, which reads only what is indexed."""
        if name not in self.file_of:
            raise BadInputError(f"base model {self.folder} has no tensor {name}", "run prepare_model again")
        try:
            return self._open(self.file_of[name]).get_slice(name)
        except (OSError, SafetensorError) as error:
            raise BadInputError(f"base model {self.folder}: {name} cannot be read: {error}") from None

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """Elements ``start`` to ``end`` of a tensor in row-major order, reading only the rows they lie in.

        FP8 matrices come dequantised (fp32), with the scales of those rows' blocks only.
        """
        source = self.slice_of(name)
        shape = source.get_shape()
        row = math.prod(shape[1:])
        first, last = start // row, -(-end // row)
        values = self._rows(source, first, last)
        if values.dtype == torch.float8_e4m3fn:
            values = self._scaled(name, values, first, last)
        return values.reshape(-1)[start - first * row : end - first * row]

    def _rows(self, source: Any, first: int, last: int) -> torch.Tensor:
        values = source[first:last]
        self.bytes_read += values.nbytes
        return values

    def _scaled(self, name: str, codes: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """fp32 values of rows ``first`` to ``last``: code × factor of the block, as prepare_model computes them."""
        scales = self.slice_of(name + SCALE_SUFFIX)
        top = first // FP8_BLOCK
        factors = self._rows(scales, top, -(-last // FP8_BLOCK)).float()
        factors = factors[torch.arange(first, last) // FP8_BLOCK - top]
        return codes.float() * factors.repeat_interleave(FP8_BLOCK, dim=1)[:, : codes.shape[1]]


def release_names(name: str, experts_per_shard: int) -> list[str]:
    """Release tensors that, laid end to end in row-major order, make up a training parameter.

    Only expert shards differ from the release: ``experts.K.w1w3`` holds gate then up of each expert.
    """
    if ".mlp.experts." not in name:
        return [name]
    layer, rest = name.split(".mlp.experts.")
    shard, kind = rest.split(".")
    parts = ("gate_proj", "up_proj") if kind == "w1w3" else ("down_proj",)
    first = int(shard) * experts_per_shard
    experts = range(first, first + experts_per_shard)
    return [f"{layer}.mlp.experts.{expert}.{part}.weight" for expert in experts for part in parts]


def load_release(model: torch.nn.Module, folder: Path) -> int:
    """Fill all parameters and the routers' correction biases.

    A parameter that ZeRO-3 has split is filled without communication: of every release tensor the rank reads the rows
    that overlap its partition. Biases are fp32 and whole on every rank.

    Returns:
        Bytes read by this rank.

    Raises:
        BadInputError: a tensor is missing, unreadable or of another size.
    """
    reader = ReleaseReader(folder)
    experts_per_shard = next((m.experts_per_shard for m in model.modules() if isinstance(m, MixtureOfExperts)), 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            names = release_names(name, experts_per_shard)
            if hasattr(parameter, "ds_tensor"):
                size = parameter.ds_tensor.ds_numel  # of every rank's partition, padding included
                start = dist.get_rank(parameter.ds_process_group) * size
                _fill(parameter.ds_tensor.data, reader, names, start, parameter.ds_numel, parameter.ds_shape)
            else:
                _fill(parameter.data.view(-1), reader, names, 0, parameter.numel(), parameter.shape)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(reader.elements(name, 0, buffer.numel()))
    return reader.bytes_read


def _fill(
    target: torch.Tensor, reader: ReleaseReader, names: list[str], start: int, elements: int, shape: torch.Size
) -> None:
    """Fill ``target``, which holds elements from ``start`` on of the parameter made up of ``names``."""
    end = min(start + target.numel(), elements)
    position = 0
    for name in names:
        size = math.prod(reader.slice_of(name).get_shape())
        low, high = max(start, position), min(end, position + size)
        if low < high:
            target[low - start : high - start].copy_(reader.elements(name, low - position, high - position))
        position += size
    if position != elements:
        raise BadInputError(
            f"base model {reader.folder}: {names[0]} has another size than its config says: "
            f"{position} elements instead of {elements} {list(shape)}",
            "run prepare_model again",
        )
