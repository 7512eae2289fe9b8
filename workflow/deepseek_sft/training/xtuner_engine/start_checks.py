"""Before the first step: the model in memory is the base on disk, and the same on all ranks.

The weights are compared through the readers of the conversion (plain byte ranges, no safetensors library) and an
index computation of their own, so that a mistake in the loader cannot hide itself.
"""

import dataclasses
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ... import families, files, json_files
from ...cli import say
from ...convert.tensor_sources import Source
from ...errors import GateError
from ...families import config_file
from ...model.training_model import TrainingModel, differences
from ...tensors import number_formats
from ...tensors.byte_ranges import OpenFiles
from ...tensors.safetensors_files import INDEX_NAME, StoredTensor, read_header
from ...tensors.tensor_spec import SCALE_SUFFIX

NAME = "start_checks.json"
PARAMETERS, ELEMENTS = 200, 256  # sampled on each rank: parameters, and elements of each
# Keys of config.json that training does not compute with, or sets for itself.
NOT_COMPUTED_WITH = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "ep_size",
    "model_type",
    "moe_layer_freq",
    "num_nextn_predict_layers",
    "quantization_config",
    "rope_scaling",  # its numbers are compared
    "scoring_func",  # checked when config.json is read
    "seq_aux",
    "aux_loss_alpha",
    "topk_method",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
ROUTER = {
    "num_experts_per_tok": "top_k",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "n_routed_experts": "n_routed_experts",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}


BASE_AGAIN = "fetch the file again, and run prepare_model again"


class StoredTensors(dict[str, StoredTensor]):
    """Where tensors of a folder lie, by name; the header of a file is read when one of its tensors is asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, index = folder, folder / INDEX_NAME
        found = json_files.read(index, {"weight_map": dict}, BASE_AGAIN)["weight_map"] if index.exists() else {}
        self.file_of: dict[str, str] = found

    def __missing__(self, name: str) -> StoredTensor:
        self.update(read_header(self.folder / self.file_of.get(name, "model.safetensors")))
        return self.get(name) or self._lacks(name)

    def _lacks(self, name: str) -> StoredTensor:
        raise GateError(f"the base {self.folder} has no tensor {name}", "run prepare_model again")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one rank found.

    Attributes:
        problems: one sentence each.
        elements: compared with the base.
        checksum: crc32 of the compared values, for the record.
        bias_checksum: crc32 of all routers' correction biases.
    """

    problems: list[str]
    elements: int
    checksum: int
    bias_checksum: int


def check(model: TrainingModel, base: Path, run: Path, dtype: str, fresh: bool) -> None:
    """Check the model on all ranks, and record the result in ``start_checks.json``; a collective.

    Args:
        fresh: the weights are the base's; False after a resume, where only what stays the same is compared.

    Raises:
        GateError: on all ranks alike, naming every difference and the ranks that see it.
    """
    problems = compare_config(model, families.published_config(base), dtype)
    elements = checksum = 0
    if fresh:
        different, elements, checksum = compare_weights(model, base, dist.get_rank())
        problems += different
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, Outcome(problems, elements, checksum, bias_checksum(model)))
    found = together(outcomes)
    if dist.get_rank() == 0:
        ranks = [{key: value for key, value in vars(outcome).items() if key != "problems"} for outcome in outcomes]
        files.write_json(run / NAME, {"fresh": fresh, "problems": found, "ranks": ranks})
    if found:
        raise GateError(
            "the model in memory is not the base model:\n" + "\n".join(f"  - {problem}" for problem in found),
            "check the base folder (prepare_model again), and that all nodes see the same files and code",
        )
    if dist.get_rank() == 0 and fresh:
        say(f"start checks passed: {sum(o.elements for o in outcomes):,} sampled weights equal the base on all ranks")


def together(outcomes: list[Outcome]) -> list[str]:
    """Problems of all ranks, each once with the ranks that see it, and routers that differ between ranks."""
    seen: dict[str, list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        for problem in outcome.problems:
            seen.setdefault(problem, []).append(rank)
    found = [f"{problem} ({_ranks(ranks, len(outcomes))})" for problem, ranks in seen.items()]
    other = [rank for rank, o in enumerate(outcomes) if o.bias_checksum != outcomes[0].bias_checksum]
    if other:
        found.append(f"the routers' correction biases differ from rank 0's ({_ranks(other, len(outcomes))})")
    return found


def compare_config(model: TrainingModel, published: dict[str, Any], dtype: str) -> list[str]:
    """What of ``config.json`` the built model would compute otherwise.

    Keys are compared with the model's, and the numbers that they imply with those in memory: a key that both lack, or
    that a library calls otherwise, would else count as equal.

    Args:
        published: ``config.json`` as it lies in the base, in old or new names.
    """
    config, published = model.config, families.checked(published)
    problems = differences(model, published)
    problems += [
        f"{key} is {getattr(config, key)!r} in the model, {value!r} in the base's config.json"
        for key, value in published.items()
        if key not in NOT_COMPUTED_WITH and hasattr(config, key) and getattr(config, key) != value
    ]
    computed_with = (*families.of(published).POSITIVE_INTEGERS, *config_file.COMPUTED)
    problems += [f"the model's configuration has no {key}" for key in computed_with if not hasattr(config, key)]
    for layer, router in enumerate(model.routers()):
        problems += [
            f"router {layer}: {name} is {getattr(router, name)!r}, the base's config.json says {published[key]!r}"
            for key, name in ROUTER.items()
            if getattr(router, name) != published[key]
        ]
    wanted = getattr(torch, dtype)
    problems += [f"{name} is {p.dtype}, not {wanted}" for name, p in model.named_parameters() if p.dtype != wanted]
    return problems


def bias_checksum(model: TrainingModel) -> int:
    """crc32 of all routers' correction biases on this rank."""
    total = 0
    for router in model.routers():
        total = zlib.crc32(router.e_score_correction_bias.detach().cpu().numpy().tobytes(), total)
    return total


def compare_weights(model: TrainingModel, base: Path, rank: int) -> tuple[list[str], int, int]:
    """Compare samples of this rank's parameters with the base.

    Returns:
        problems, number of elements compared, their checksum.
    """
    opened, tensors = OpenFiles(), StoredTensors(base)
    parameters = dict(model.named_parameters())
    chosen = random.Random(rank)
    names = sorted(parameters)
    if len(names) > PARAMETERS:
        names = chosen.sample(names, PARAMETERS)
    problems, compared, checksum = [], 0, 0
    for name in names:
        values, first = _own_part(parameters[name])
        count = min(ELEMENTS, values.numel())
        if not count:
            continue  # the parameter is smaller than the number of ranks
        start = chosen.randint(0, values.numel() - count)
        got = values[start : start + count].detach().float().cpu().numpy()
        shape = tuple(getattr(parameters[name], "ds_shape", parameters[name].shape))
        wanted = np.concatenate([_read(opened, tensors, *part) for part in _parts(name, shape, first + start, count)])
        if parameters[name].dtype == torch.bfloat16:  # what the base holds in FP32 is rounded when it is loaded
            wanted = number_formats.bf16_to_float32(number_formats.float32_to_bf16(wanted))
        if not np.array_equal(got, wanted):
            index = first + start + int(np.flatnonzero(got != wanted)[0])
            problems.append(f"{name}: element {index} differs from the base")
        compared += count
        checksum = zlib.crc32(got.tobytes(), checksum)
    for layer, router in zip(_moe_layers(model), model.routers(), strict=True):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        bias = router.e_score_correction_bias.detach().cpu().numpy()
        if not np.array_equal(bias, _read(opened, tensors, name, 0, bias.size)):
            problems.append(f"{name} differs from the base")
        compared += bias.size
    return problems, compared, checksum


def _own_part(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """This rank's elements of a parameter, padding left out, and the index of the first."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.reshape(-1), 0
    size = parameter.ds_tensor.ds_numel
    first = dist.get_rank(parameter.ds_process_group) * size
    return parameter.ds_tensor[: max(0, min(size, parameter.ds_numel - first))], first


def _parts(name: str, shape: tuple[int, ...], start: int, count: int) -> list[tuple[str, int, int]]:
    """Release tensors, first element and number of elements that make up a run of a training parameter's elements."""
    if ".mlp.experts." not in name:
        return [(name, start, count)]
    layer, rest = name.split(".mlp.experts.")
    shard, kind = rest.split(".")
    experts, rows, columns = shape
    parts = []
    while count:
        row = start // columns
        expert, row_of_expert = int(shard) * experts + row // rows, row % rows
        take = min(count, columns - start % columns)
        if kind == "w2":
            matrix = "down_proj"
        else:  # gate above up
            matrix = "gate_proj" if row_of_expert < rows // 2 else "up_proj"
            row_of_expert %= rows // 2
        tensor = f"{layer}.mlp.experts.{expert}.{matrix}.weight"
        parts.append((tensor, row_of_expert * columns + start % columns, take))
        start, count = start + take, count - take
    return parts


def _read(opened: OpenFiles, tensors: StoredTensors, name: str, start: int, count: int) -> np.ndarray:
    """Elements of a tensor of the base as float32, rounded to BF16 where it is stored in FP8."""
    stored = tensors[name]
    if stored.spec.dtype != "F8_E4M3":
        source = Source(stored, 0, stored.spec.shape)
        return number_formats.to_float32(source.read(opened, start, count), source.dtype)
    columns = stored.spec.shape[1]
    low, high = start // columns * columns, -(-(start + count) // columns) * columns
    source = Source(stored, 0, stored.spec.shape, factors=tensors[name + SCALE_SUFFIX])
    rows = source.read(opened, low, high - low)[start - low : start - low + count]
    return number_formats.bf16_to_float32(number_formats.float32_to_bf16(rows))


def _moe_layers(model: TrainingModel) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


def _ranks(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size:
        return "all ranks"
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
