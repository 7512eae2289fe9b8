"""Checks of a converted model against the base it was trained from and the checkpoint it was made from.

Each check has a name and lists every tensor or file that fails it; see docs/checkpoints.md for the bounds.
"""

import concurrent.futures
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cli, files
from ..errors import BadInputError, GateError
from ..model import release
from .base_model import BaseModel
from .convert import restore_biases
from .release_names import Source, release_sources
from .safetensors_files import INDEX_NAME, StoredTensor, read_header
from .weight_checks import ChangeBound, Measured, measure_file
from .zero3 import Checkpoint

ADAPTED_KEYS = ("torch_dtype", "dtype", "num_nextn_predict_layers", "transformers_version")
LARGEST_RELATIVE_CHANGE = 1.0  # without learning rate and steps; an unrelated tensor of equal size changes by 1.41
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
SHOWN = 20  # failing tensors named per check


@dataclass
class Check:
    """One check: what was looked at, and everything that fails it."""

    scope: str
    failures: list[str] = field(default_factory=list)

    @property
    def detail(self) -> str:
        if not self.failures:
            return self.scope
        more = f" … and {len(self.failures) - SHOWN} more" if len(self.failures) > SHOWN else ""
        return f"{len(self.failures)} failed: " + "; ".join(self.failures[:SHOWN]) + more


@dataclass
class Verification:
    """All checks by name, and what was measured."""

    checks: dict[str, Check]
    figures: dict[str, Any]

    def require(self, model: Path) -> None:
        """Raises GateError naming every check that failed and the tensors or files in it."""
        failed = {name: check for name, check in self.checks.items() if check.failures}
        if failed:
            lines = "\n".join(f"  {name}: {check.detail}" for name, check in failed.items())
            raise GateError(
                f"{model} failed {len(failed)} of {len(self.checks)} checks:\n{lines}",
                "do not serve it; convert the checkpoint again, and if that does not help train from an older one",
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_config(model: Path, base: BaseModel) -> Check:
    """The config may differ from the base's in what conversion adapts, and in nothing else."""
    check = Check(f"equal to the base's but for {', '.join(ADAPTED_KEYS)}")
    config = _read_json(model / "config.json")
    if not isinstance(config, dict):
        check.failures.append("config.json is missing or unreadable")
        return check
    for key in sorted({*config, *base.config} - {*ADAPTED_KEYS}):
        if config.get(key) != base.config.get(key):
            check.failures.append(f"{key} is {config.get(key)!r}, the base has {base.config.get(key)!r}")
    if config.get("torch_dtype") not in DTYPES:
        check.failures.append(f"torch_dtype is {config.get('torch_dtype')!r}")
    if config.get("num_nextn_predict_layers", 0) != 0:
        check.failures.append("num_nextn_predict_layers is not 0, but that layer was not trained")
    return check


def check_companions(model: Path, base: BaseModel) -> Check:
    """Tokenizer and generation files are the base's, byte for byte."""
    names = [
        path.name
        for path in sorted(base.folder.iterdir())
        if path.is_file() and path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "generation_config"))
    ]
    check = Check(f"{len(names)} files equal: {', '.join(names)}")
    for name in names:
        if not (model / name).is_file():
            check.failures.append(f"{name} is missing")
        elif (model / name).read_bytes() != (base.folder / name).read_bytes():
            check.failures.append(f"{name} differs")
    return check


def read_files(model: Path) -> tuple[Check, dict[Path, dict[str, StoredTensor]]]:
    """The weight files and their headers; index, files and tensors must agree."""
    paths = sorted(model.glob("*.safetensors"))
    check = Check(f"{len(paths)} files complete, index and headers agree")
    found: dict[Path, dict[str, StoredTensor]] = {}
    for path in paths:
        try:
            found[path] = read_header(path)
        except BadInputError as error:
            check.failures.append(error.problem)
    places = {name: path.name for path, tensors in found.items() for name in tensors}
    if sum(map(len, found.values())) != len(places):
        check.failures.append("a tensor lies in two files")
    if not paths:
        check.failures.append("there are no *.safetensors files")
    if (model / INDEX_NAME).exists() or len(paths) > 1:
        index = _read_json(model / INDEX_NAME) or {}
        listed = set((index.get("weight_map") or {}).values())
        check.failures += [f"{name} is missing" for name in sorted(listed - {path.name for path in paths})]
        total = sum(t.bytes for tensors in found.values() for t in tensors.values())
        if index.get("weight_map") != places:
            check.failures.append(f"{INDEX_NAME} does not describe the files")
        elif index.get("metadata", {}).get("total_size") != total:
            check.failures.append(f"{INDEX_NAME}: total_size is not {total}")
    return check, found


def _compare_sets(found: Iterable[str], expected: Iterable[str]) -> list[str]:
    found, expected = set(found), set(expected)
    return [f"{n} is missing" for n in sorted(expected - found)] + [f"{n} is new" for n in sorted(found - expected)]


def check_tensors(base: BaseModel, tensors: dict[str, StoredTensor], dtype: str) -> dict[str, Check]:
    """Names, shapes and dtypes are the base's (without its multi-token-prediction layer)."""
    expected = dict(base.ordered)
    elements = sum(spec.elements for spec in expected.values())
    names = Check(f"{len(expected)} tensors, {elements} parameters", _compare_sets(tensors, expected))
    shapes, dtypes = Check("as in the base"), Check(f"{dtype}; router biases as in the base")
    for name in sorted(tensors.keys() & expected.keys()):
        spec, wanted = tensors[name].spec, expected[name]
        if spec.shape != wanted.shape:
            shapes.failures.append(f"{name} has {list(spec.shape)}, the base {list(wanted.shape)}")
        wanted_dtype = "F32" if dtype == "F32" else wanted.dtype
        if spec.dtype != wanted_dtype:
            dtypes.failures.append(f"{name} is {spec.dtype}, not {wanted_dtype}")
    return {"names": names, "shapes": shapes, "dtypes": dtypes}


def check_values(measured: dict[str, Measured], bound: ChangeBound | None, with_checkpoint: bool) -> dict[str, Check]:
    """Finite, untouched tensors equal, changes within the bound, equal to the checkpoint."""
    finite = Check("all values")
    untouched = Check("router biases equal the base's")
    limit = (
        f"|change| ≤ {bound.drift:.3g} besides rounding" if bound else f"‖change‖/‖base‖ ≤ {LARGEST_RELATIVE_CHANGE}"
    )
    change = Check(limit)
    for name, figures in sorted(measured.items()):
        if figures.non_finite:
            finite.failures.append(f"{name}: {figures.non_finite} values")
        if name.endswith(release.CORRECTION_BIAS) and figures.differing:
            untouched.failures.append(f"{name}: {figures.differing} values differ")
        if bound and figures.largest_excess > bound.drift * 1.001:
            change.failures.append(f"{name}: an element moved by {figures.largest_excess:.3g}")
        if not bound and figures.relative_change > LARGEST_RELATIVE_CHANGE:
            change.failures.append(f"{name}: relative change {figures.relative_change:.3g}")
    checks = {"finite": finite, "untouched": untouched, "change": change}
    if with_checkpoint:
        compared = sum(figures.compared for figures in measured.values())
        equal = Check(f"{compared} values equal bit for bit")
        equal.failures = [f"{n}: {m.unequal} of {m.compared} values" for n, m in sorted(measured.items()) if m.unequal]
        checks["checkpoint"] = equal
    return checks


def verify(
    model: Path,
    base: BaseModel,
    checkpoint: Checkpoint | None = None,
    bound: ChangeBound | None = None,
    full: bool = False,
    workers: int = 8,
) -> Verification:
    """Run every check; each weight is read once, and once more where it is compared with the checkpoint.

    Args:
        model: converted folder.
        base: BF16 base it was trained from.
        checkpoint: what it was converted from, or None to leave that comparison out.
        bound: how far training can have moved an element, or None to use the relative bound alone.
        full: compare every element with the checkpoint instead of samples of each tensor.
        workers: files checked at the same time.

    Raises:
        BadInputError: the base is no BF16 model, or the checkpoint does not belong to it.
    """
    if base.quantised:
        raise BadInputError(f"{base.folder} is FP8", "give the BF16 base that training started from (prepare_model)")
    config = _read_json(model / "config.json") or {}
    dtype = DTYPES.get(config.get("torch_dtype"), "BF16")
    checks = {"config": check_config(model, base), "tokenizer": check_companions(model, base)}
    checks["files"], found = read_files(model)
    tensors = {name: tensor for held in found.values() for name, tensor in held.items()}
    checks |= check_tensors(base, tensors, dtype)
    sources: dict[str, Source] | None = None
    if checkpoint:
        sources = release_sources(checkpoint, dict(base.ordered))
        restore_biases(sources, base)

    measured: dict[str, Measured] = {}
    hashes: dict[str, str] = {}
    decay = bound.decay if bound else 0.0
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        tasks = {executor.submit(measure_file, p, held, base, sources, decay, full): p for p, held in found.items()}
        for done, task in enumerate(concurrent.futures.as_completed(tasks), 1):
            digest, figures = task.result()
            hashes[tasks[task].name] = digest
            measured |= figures
            cli.say(f"{tasks[task].name}: {len(figures)} tensors checked, {done}/{len(tasks)}")
    checks |= check_values(measured, bound, checkpoint is not None)
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in hashes:
            hashes[path.name] = files.fingerprint_file(path, full=True).removeprefix("sha256:")
    changes = {name: m.relative_change for name, m in measured.items() if m.relative_change < float("inf")}
    largest = max(changes, key=changes.__getitem__, default=None)
    return Verification(
        checks,
        {
            "tensors": len(tensors),
            "parameters": sum(t.spec.elements for t in tensors.values()),
            "largest_relative_change": changes[largest] if largest else 0.0,
            "most_changed_tensor": largest,
            "unchanged_tensors": sum(m.differing == 0 for m in measured.values()),
            "values_compared_with_checkpoint": sum(m.compared for m in measured.values()),
            "sha256": dict(sorted(hashes.items())),
        },
    )
