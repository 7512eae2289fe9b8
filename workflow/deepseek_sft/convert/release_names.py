"""From training's parameters to the release's tensors: prefix off, fused experts apart.

Training may keep several experts in one parameter (xtuner's ExpertShard): ``experts.K.w1w3`` of shape
[n, 2·ffn, hidden] holds for each of the experts K·n … K·n+n-1 its gate_proj, then its up_proj; ``experts.K.w2`` of
shape [n, hidden, ffn] their down_proj. In memory each expert's matrix is one contiguous range, so that un-merging
moves no elements. transformers 5 keeps all experts of a layer alike in one ``experts.gate_up_proj`` and one
``experts.down_proj``.
"""

import math
import re
from collections.abc import Mapping

from ..errors import BadInputError
from ..tensors.number_formats import FLOATS
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.tensor_spec import TensorSpec
from .tensor_sources import Source
from .zero import Checkpoint

STOCK_PREFIXES = ("llm.", "module.", "")
FUSED = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(w1w3|w2)")
ALL_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")  # transformers 5: one shard of all experts
COMPUTED = re.compile(r"(^|\.)rotary_emb\.\w+$")  # buffers that follow from config.json


def prefix_of(checkpoint: Checkpoint) -> str:
    """The part of training's names that the release does not have: the marker's word, or what all names share."""
    if checkpoint.marker:
        return checkpoint.marker.parameter_prefix
    return next(p for p in STOCK_PREFIXES if all(name.startswith(p) for name in checkpoint.parameters))


def unmerge(name: str, parameter: Partitioned) -> dict[str, Source]:
    """The release tensors inside one parameter; itself if it is no shard of experts."""
    shard, whole = FUSED.fullmatch(name), ALL_FUSED.fullmatch(name)
    match = shard or whole
    if not match:
        return {name: Source(parameter, 0, parameter.shape)}
    two = match[match.lastindex or 0] in ("w1w3", "gate_up_proj")
    if len(parameter.shape) != 3 or (two and parameter.shape[1] % 2):
        raise BadInputError(f"the shard of experts {name} has shape {parameter.shape}, expected [n, rows, columns]")
    experts, rows, columns = parameter.shape
    parts = ("gate_proj", "up_proj") if two else ("down_proj",)
    first = int(shard[2]) * experts if shard else 0
    shape = (rows // len(parts), columns)
    size = math.prod(shape)
    return {
        f"{match[1]}.{first + i}.{part}.weight": Source(parameter, (i * len(parts) + j) * size, shape)
        for i in range(experts)
        for j, part in enumerate(parts)
    }


def release_sources(
    checkpoint: Checkpoint, wanted: Mapping[str, TensorSpec], missing_from_base: bool = False
) -> dict[str, Source]:
    """Find the source of every wanted tensor.

    Args:
        checkpoint: what training saved.
        wanted: release name → shape, as the base model has it.
        missing_from_base: leave out what the checkpoint does not hold; the base's own is taken for it.

    Returns:
        Release name → source, in the order of ``wanted``.

    Raises:
        BadInputError: parameters missing, left over or of another shape, with the first few names.
    """
    prefix = prefix_of(checkpoint)
    found: dict[str, Source] = {}

    def add(sources: Mapping[str, Source]) -> None:
        for name, source in sources.items():
            if name in found:
                raise BadInputError(f"{checkpoint.folder}: two parameters would become {name}")
            found[name] = source

    for training_name, parameter in checkpoint.parameters.items():
        _check_shard(checkpoint, training_name, parameter)
        add(unmerge(training_name.removeprefix(prefix), parameter))
    for training_name, stored in checkpoint.buffers.items():
        if not COMPUTED.search(training_name):
            add({training_name.removeprefix(prefix): Source(stored, 0, stored.spec.shape)})
    for alias, training_name in checkpoint.shared.items():
        _add_tied(found, wanted, alias.removeprefix(prefix), training_name.removeprefix(prefix))
    missing, unknown = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    if (missing and not missing_from_base) or unknown:
        fix = "give the base model that this training run started from"
        if checkpoint.frozen_unsaved and missing and not unknown:
            fix += (
                "; or, if these parameters were frozen and the checkpoint saved with exclude_frozen_parameters, take "
            )
            fix += "them from the base: --missing-from-base"
        text = "; ".join(
            f"{len(names)} {what}, first {names[0]}"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        )
        raise BadInputError(
            f"{checkpoint.folder} and the base model do not have the same tensors: {text}",
            fix,
        )
    if not found:
        raise BadInputError(f"{checkpoint.folder} holds no parameter of the base model", "give its base model")
    present = {name: spec for name, spec in wanted.items() if name in found}
    for name, spec in present.items():
        if tuple(found[name].shape) != spec.shape:
            raise BadInputError(
                f"{checkpoint.folder}: {name} has shape {found[name].shape}, in the base model {spec.shape}",
                "give the base model that this training run started from",
            )
        if found[name].dtype not in FLOATS:
            raise BadInputError(f"{checkpoint.folder}: {name} is {found[name].dtype}, which is no weight")
    return {name: found[name] for name in present}


def _add_tied(found: dict[str, Source], wanted: Mapping[str, TensorSpec], alias: str, name: str) -> None:
    """One parameter under two names: the release keeps both, or the one that its config asks for."""
    if name in found:
        found.setdefault(alias, found[name])
        if alias in wanted and name not in wanted:
            del found[name]
        elif name in wanted and alias not in wanted:
            del found[alias]


def _check_shard(checkpoint: Checkpoint, name: str, parameter: Partitioned) -> None:
    marker = checkpoint.marker
    if marker is None or not FUSED.fullmatch(name.removeprefix(marker.parameter_prefix)):
        return
    if marker.expert_layout != "w1w3_w2" or parameter.shape[0] != marker.experts_per_shard:
        raise BadInputError(
            f"{checkpoint.folder}: {name} has shape {parameter.shape}, but the commit marker speaks of experts "
            f"{marker.expert_layout} with {marker.experts_per_shard} per shard"
        )
