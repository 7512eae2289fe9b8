"""Checks of a converted model against the base it was trained from and the checkpoint it was made from.

Each check has a name and lists every tensor or file that fails it; see docs/checkpoints.md for the bounds.
"""

import concurrent.futures
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cli, families, files, json_files
from ..convert.base_model import QUANTISATION_FILE, BaseModel
from ..convert.convert import trained_sources
from ..convert.output_tensors import TORCH_DTYPES, copied_sources, output_config, output_specs
from ..convert.tensor_sources import Source
from ..convert.zero import Checkpoint
from ..data.tokenizer_files import CONFIG, RANKS, WHOLE, served_config, tokenizer_text, vocabulary_file
from ..errors import BadInputError, GateError
from ..tensors.byte_ranges import OpenFiles, allow_open_files
from ..tensors.safetensors_files import INDEX_NAME, StoredTensor, read_header
from ..tensors.tensor_spec import SCALE_SUFFIX
from .weight_checks import E4M3_LARGEST_ERROR, ChangeBound, Measured, measure_file

FREE_KEYS = ("transformers_version",)
LARGEST_RELATIVE_CHANGE = 1.0  # without learning rate and steps; an unrelated tensor of equal size changes by 1.41
BIAS_ROUNDING = 1.01  # a bias is a sum of as many moves as there were steps
SMALLEST_MOVE = 2.0**-23  # relative; a change of half of it is surely resolved by FP32
ROUTER = ".mlp.gate.weight"
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
        return json_files.load(path)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Kind:
    """What kind of output a model says it is: see ``convert.Options``."""

    dtype: str
    mtp: str


def kind_of(config: dict[str, Any], base: BaseModel) -> Kind:
    """By its ``config.json``; ``bf16`` where that says nothing known, which the check of the config reports."""
    named = config.get("torch_dtype", config.get("dtype"))
    dtype = next((dtype for dtype, name in TORCH_DTYPES.items() if name == named), "bf16")
    if config.get("quantization_config") is not None:
        dtype = "fp8"
    return Kind(dtype, "copy" if config.get("num_nextn_predict_layers") and base.mtp else "drop")


def check_config(config: Any, base: BaseModel, kind: Kind) -> Check:
    """The config is what conversion must make of the base's, in every key."""
    check = Check(f"the base's, adapted to {kind.dtype}, multi-token prediction: {kind.mtp}")
    if not isinstance(config, dict):
        check.failures.append("config.json is missing or unreadable")
        return check
    expected = output_config(base, kind.dtype, kind.mtp)
    for key in sorted({*config, *expected} - {*FREE_KEYS}):
        found = config.get(key, 0 if key == "num_nextn_predict_layers" else None)
        if found != expected.get(key):
            check.failures.append(f"{key} is {found!r}, must be {expected.get(key)!r}")
    try:
        families.checked(config)
    except BadInputError as error:
        check.failures.append(error.problem.removeprefix("config.json: "))
    return check


def check_companions(model: Path, base: BaseModel) -> Check:
    """Tokenizer, generation and code files are the base's, byte for byte.

    Where the base's tokenizer is a ``tiktoken.model`` and code, the model has an equal ``tokenizer.json`` and no code.
    """
    made: dict[str, bytes] = {}
    if vocabulary_file(base.folder).name == RANKS:
        made = {WHOLE: tokenizer_text(base.folder).encode(), CONFIG: served_config(base.folder)}
    names = [
        path.name
        for path in sorted(base.folder.iterdir())
        if path.is_file()
        and (
            path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "generation_config"))
            or path.suffix in ((".jinja",) if made else (".py", ".jinja"))
        )
    ]
    names = sorted({*names, *made})
    check = Check(f"{len(names)} files equal: {', '.join(names)}" + (f"; {WHOLE} made from {RANKS}" if made else ""))
    for name in names:
        if not (model / name).is_file():
            check.failures.append(f"{name} is missing")
        elif (model / name).read_bytes() != (made[name] if name in made else (base.folder / name).read_bytes()):
            check.failures.append(f"{name} differs")
    if made:
        left = [path.name for path in sorted(model.iterdir()) if path.name == RANKS or path.suffix == ".py"]
        check.failures += [f"{name} is there, and servers would take it for the tokenizer's" for name in left]
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
    stray = [path.name for path in sorted(model.iterdir()) if QUANTISATION_FILE.fullmatch(path.name)]
    check.failures += [f"{name} describes another quantisation; vLLM reads it" for name in stray]
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


def check_tensors(base: BaseModel, tensors: dict[str, StoredTensor], kind: Kind) -> dict[str, Check]:
    """Names, shapes and dtypes are the base's, with block factors if FP8."""
    expected = output_specs(base, kind.dtype, kind.mtp)
    elements = sum(base.tensors[name].spec.elements for name in base.weights(kind.mtp == "copy"))
    names = Check(f"{len(expected)} tensors, {elements} parameters", _compare_sets(tensors, expected))
    shapes, dtypes = Check("as in the base"), Check(f"{kind.dtype}; router biases as in the base")
    for name in sorted(tensors.keys() & expected.keys()):
        spec, wanted = tensors[name].spec, expected[name]
        if spec.shape != wanted.shape:
            shapes.failures.append(f"{name} has {list(spec.shape)}, must have {list(wanted.shape)}")
        if spec.dtype != wanted.dtype:
            dtypes.failures.append(f"{name} is {spec.dtype}, not {wanted.dtype}")
    return {"names": names, "shapes": shapes, "dtypes": dtypes}


def is_frozen(name: str, freeze: Collection[str]) -> bool:
    """Whether a tensor belongs to what ``train.freeze`` left as it was."""
    return "router" in freeze and name.endswith(ROUTER)


def check_frozen(measured: dict[str, Measured], freeze: Collection[str]) -> Check:
    """What the run froze is the base's, its master weights as well, every value of them."""
    found = {name: figures for name, figures in sorted(measured.items()) if is_frozen(name, freeze)}
    check = Check(f"{len(found)} tensors of train.freeze [{', '.join(freeze)}] equal the base's")
    check.failures = [f"{name} moved, and the run froze it" for name, figures in found.items() if figures.moved]
    if not found:
        check.failures.append(f"there is nothing of train.freeze [{', '.join(freeze)}]")
    return check


def check_values(
    measured: dict[str, Measured],
    bound: ChangeBound | None,
    copied: set[str],
    with_checkpoint: bool,
    correction_bias: str,
) -> dict[str, Check]:
    """Finite, untouched tensors equal, changes within the bound, equal to the checkpoint.

    Args:
        copied: names of the tensors that come from the base.
        correction_bias: last part of the names of the family's router biases.
    """
    finite = Check("all values")
    bias_drift = bound.bias_drift if bound else 0.0
    kept = ([] if bias_drift else ["router biases"]) + ([f"{len(copied)} copied tensors"] if copied else [])
    untouched = Check(
        " and ".join(kept) + " equal the base's" if kept else "nothing: the balance rule moved the biases"
    )
    limit = (
        f"|change| ≤ {bound.drift:.3g} besides rounding" if bound else f"‖change‖/‖base‖ ≤ {LARGEST_RELATIVE_CHANGE}"
    )
    if bias_drift:
        limit += f", of router biases ≤ {bias_drift:.3g}"
    change = Check(limit)
    for name, figures in sorted(measured.items()):
        if figures.non_finite:
            finite.failures.append(f"{name}: {figures.non_finite} values")
        bias = name.endswith(correction_bias) and name not in copied
        if bias and not bias_drift and figures.differing:
            untouched.failures.append(f"{name}: {figures.differing} values differ")
        elif name in copied and figures.unequal:
            untouched.failures.append(f"{name}: {figures.unequal} values differ")
        if name in copied:
            continue
        if figures.base_non_finite:
            change.failures.append(
                f"{name}: {figures.base_non_finite} values of the base are infinite or not numbers, how far they moved "
                "cannot be judged"
            )
        if bias and bias_drift:
            if not figures.largest_excess <= bias_drift * BIAS_ROUNDING:
                change.failures.append(f"{name}: a bias moved by {figures.largest_excess:.3g}")
            continue
        if bound and not figures.largest_excess <= bound.drift * 1.001:
            change.failures.append(f"{name}: an element moved by {figures.largest_excess:.3g}")
        if not bound and not figures.relative_change <= LARGEST_RELATIVE_CHANGE:
            change.failures.append(f"{name}: relative change {figures.relative_change:.3g}")
    checks = {"finite": finite, "untouched": untouched, "change": change}
    if with_checkpoint:
        trained = {name: figures for name, figures in sorted(measured.items()) if name not in copied}
        compared = sum(figures.compared for figures in trained.values())
        checks["checkpoint"] = Check(
            f"{compared} values equal bit for bit",
            [f"{n}: {m.unequal} of {m.compared} values" for n, m in trained.items() if m.unequal],
        )
        checks["checkpoint"].failures += [
            f"{n}: dequantised, it is off by {m.fp8_error:.3g} of a block's largest value"
            for n, m in trained.items()
            if not m.fp8_error <= E4M3_LARGEST_ERROR * 1.001
        ]
    return checks


def check_stepped(
    measured: dict[str, Measured],
    trained: dict[str, Source],
    missing: list[str],
    base: BaseModel,
    bound: ChangeBound | None,
    freeze: Collection[str] = (),
) -> Check:
    """Every trained tensor's master weights differ from the base: AdamW moves each one at every step.

    They are FP32, so that rounding to BF16 does not hide a step. What may equal the base all the same is named in the
    check's scope: parameters that no optimizer holds; routed experts that got no token, where weight decay is too small
    to move them either; and tensors whose every value is so large that FP32 rounds a step of the learning rate away.

    Args:
        trained: source of every tensor that the checkpoint holds.
        missing: names of those that it does not hold.
        freeze: what the run left as it was, which ``check_frozen`` judges.
    """
    judged = {name: m for name, m in measured.items() if m.stepped is not None and not is_frozen(name, freeze)}
    never = [name for name, figures in sorted(judged.items()) if not figures.stepped]
    frozen = [name for name, source in trained.items() if getattr(source.parameter, "trained", None) is False]
    frozen += missing
    decays = bound is not None and bound.decay_per_step >= SMALLEST_MOVE
    excused = [name for name in never if not decays and may_get_no_gradient(name, base.config)]
    notes = [f"{len(judged)} tensors of FP32 master weights, all but {len(never)} moved from the base"]
    if bound is not None and not bound.drift >= SMALLEST_MOVE:
        excused = never
        notes.append(f"learning rate and steps move nothing by more than {bound.drift:.3g}")
    elif excused:
        notes.append(f"no token was routed to {_named(excused)}")
    rate = bound.learning_rate if bound else SMALLEST_MOVE / 2
    large = [name for name in never if name not in excused and rate < judged[name].smallest * SMALLEST_MOVE / 2]
    if large:
        notes.append(f"too large for FP32 to resolve one step of {rate:.3g}: {_named(large)}")
    if frozen:
        notes.append(f"not trained: {_named(frozen)}")
    if not judged:
        notes.append("the master weights are not FP32: not judged")
    check = Check("; ".join(notes))
    kept = {*excused, *large}
    check.failures = [f"{name} equals the base bit for bit: it was never stepped" for name in never if name not in kept]
    return check


def may_get_no_gradient(name: str, config: dict[str, Any]) -> bool:
    """Whether a run can leave this tensor without any gradient: an expert without tokens, a router without a choice."""
    if ".mlp.experts." in name:
        return True
    return name.endswith(ROUTER) and config["num_experts_per_tok"] == 1 and bool(config["norm_topk_prob"])


def _named(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def verify(
    model: Path,
    base: BaseModel,
    checkpoint: Checkpoint | None = None,
    bound: ChangeBound | None = None,
    full: bool = False,
    workers: int = 8,
    wanted: Kind | None = None,
    missing_from_base: bool = False,
    freeze: Collection[str] = (),
) -> Verification:
    """Run every check; each weight is read once, and once more where it is compared with the checkpoint.

    Args:
        model: converted folder.
        base: what it was trained from, in BF16 or the release's FP8.
        checkpoint: what it was converted from, or None to leave that comparison out.
        bound: how far training can have moved an element, or None to use the relative bound alone.
        full: compare every element with the checkpoint instead of samples of each tensor.
        workers: files checked at the same time.
        wanted: what kind the model must be; None takes what it says it is.
        missing_from_base: parameters that the checkpoint does not hold were taken from the base.
        freeze: what the run left as it was (``train.freeze``).

    Raises:
        BadInputError: the checkpoint does not belong to the base.
    """
    config = _read_json(model / "config.json")
    kind = wanted or kind_of(config if isinstance(config, dict) else {}, base)
    checks = {"config": check_config(config, base, kind), "tokenizer": check_companions(model, base)}
    checks["files"], found = read_files(model)
    tensors = {name: tensor for held in found.values() for name, tensor in held.items()}
    checks |= check_tensors(base, tensors, kind)
    extra = [name for name in base.weights(kind.mtp == "copy") if name not in base.expected]
    trained: dict[str, Source] = {}
    frozen: list[str] = []
    if checkpoint:
        trained, _, frozen = trained_sources(checkpoint, base, missing_from_base)
        extra += frozen
    sources: dict[str, Source] = copied_sources(base, output_specs(base, kind.dtype, kind.mtp), extra)
    copied = set(sources)
    sources |= trained

    measured: dict[str, Measured] = {}
    hashes: dict[str, str] = {}
    decay = bound.decay if bound else 0.0
    allow_open_files((checkpoint.file_count if checkpoint else 0) + len(base.files) + len(found))
    with OpenFiles() as opened, concurrent.futures.ThreadPoolExecutor(workers) as executor:
        tasks = {
            executor.submit(measure_file, opened, path, held, tensors, base, sources, decay, full): path
            for path, held in found.items()
        }
        try:
            for done, task in enumerate(concurrent.futures.as_completed(tasks), 1):
                digest, figures = task.result()
                hashes[tasks[task].name] = digest
                measured |= figures
                cli.say(f"{tasks[task].name}: {len(figures)} tensors checked, {done}/{len(tasks)}")
        except BaseException:  # the rest would be read for nothing
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    checks |= check_values(measured, bound, copied, checkpoint is not None, families.of(base.config).CORRECTION_BIAS)
    if checkpoint:
        checks["stepped"] = check_stepped(measured, trained, frozen, base, bound, freeze)
    if freeze:
        checks["frozen"] = check_frozen(measured, freeze)
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in hashes:
            hashes[path.name] = files.fingerprint_file(path, full=True).removeprefix("sha256:")
    changes = {name: m.relative_change for name, m in measured.items() if m.relative_change < float("inf")}
    largest = max(changes, key=changes.__getitem__, default=None)
    return Verification(
        checks,
        {
            "dtype": kind.dtype,
            "tensors": len(tensors),
            "parameters": sum(t.spec.elements for n, t in tensors.items() if not n.endswith(SCALE_SUFFIX)),
            "largest_relative_change": changes[largest] if largest else 0.0,
            "most_changed_tensor": largest,
            "never_stepped_tensors": sum(m.stepped is False for m in measured.values()),
            "unchanged_tensors": sum(m.differing == 0 for m in measured.values()),
            "values_compared_with_checkpoint": sum(m.compared for n, m in measured.items() if n not in copied),
            "largest_fp8_error": max((m.fp8_error for m in measured.values()), default=0.0),
            "sha256": dict(sorted(hashes.items())),
        },
    )
