"""A base model's folder: which tensors it holds where, and whether that is complete."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..model import release
from ..model.release import TensorSpec
from . import fp8_blocks
from .safetensors_files import INDEX_NAME, StoredTensor, read_header
from .sources import Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SAMPLES, SAMPLE_SIZE = 16, 4096  # blocks of each weight file that enter the fingerprint


@dataclass(frozen=True)
class BaseModel:
    """A checked model folder.

    Attributes:
        config: its ``config.json``.
        tensors: name → where it lies, in the order of files and of offsets in them.
        expected: name → shape and dtype by the config, without the multi-token-prediction layer.
        mtp: names of the multi-token-prediction layer's tensors; they are not trained.
        files: weight files in order.
        quantised: whether it is the FP8 block format.
        fingerprint: over config, headers and sampled blocks of the weights.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    expected: dict[str, TensorSpec]
    mtp: list[str]
    files: list[Path]
    quantised: bool
    fingerprint: str

    def weights(self, mtp: bool) -> list[str]:
        """Names of the trained tensors in the order in which they lie in the folder; on demand with those of MTP."""
        copied = {name for name in self.mtp if not name.endswith(release.SCALE_SUFFIX)} if mtp else set()
        return [name for name in self.tensors if name in self.expected or name in copied]

    def source(self, name: str) -> Source:
        """Where a weight's values are read, dequantised if it is FP8."""
        stored = self.tensors[name]
        factors = self.tensors[name + release.SCALE_SUFFIX] if stored.spec.dtype == "F8_E4M3" else None
        return Source(stored, 0, stored.spec.shape, factors)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files in order, and the index's map if there is an index."""
    index = folder / INDEX_NAME
    if not index.exists():
        if (folder / "model.safetensors").is_file():
            return ["model.safetensors"], None
        raise BadInputError(f"{folder} holds neither {INDEX_NAME} nor model.safetensors", "fetch the model again")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values())), weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{index} cannot be read: {error!r}", "fetch this file again") from None


def _fingerprint(config: dict[str, Any], files: list[Path]) -> str:
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        hasher.update(f"{path.name}\0{size}\n".encode())
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            hasher.update(stream.read(length))
            for i in range(SAMPLES):
                stream.seek(8 + length + max(0, size - 8 - length - SAMPLE_SIZE) * i // (SAMPLES - 1))
                hasher.update(stream.read(SAMPLE_SIZE))
    return f"model:{hasher.hexdigest()}"


def is_quantised(config: dict[str, Any], folder: Path) -> bool:
    """Whether the folder is in the release's FP8 block format.

    Raises:
        BadInputError: it is quantised in some other way.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return False
    block = [release.FP8_BLOCK] * 2
    if settings.get("quant_method") != "fp8" or settings.get("weight_block_size") != block:
        raise BadInputError(
            f"{folder / 'config.json'}: quantization_config is {settings}; only the release's FP8 format with blocks "
            f"of {block} can be dequantised",
            "use the official release or a BF16 copy of it",
        )
    return True


def open_model(folder: Path, *, config: dict[str, Any] | None = None) -> BaseModel:
    """Read and check a model folder: files, index, names, shapes and dtypes.

    Args:
        folder: Hugging Face model folder of the DeepSeek-V3 architecture.
        config: to use in place of the folder's own.

    Raises:
        BadInputError: what is missing, cut or of the wrong shape, with the first few names.
    """
    config = config or release.read_config(folder)
    quantised = is_quantised(config, folder)
    names, weight_map = _weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInputError(f"{folder} is incomplete: {_few(missing)} of {len(names)} files missing", "fetch them")
    files = [folder / name for name in names]
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise BadInputError(f"{path}: {name} lies also in {tensors[name].file.name}", "remove one of the files")
            tensors[name] = tensor
    if weight_map is not None:
        wrong = [n for n, file in weight_map.items() if n not in tensors or tensors[n].file.name != file]
        wrong += [n for n in tensors if n not in weight_map]
        if wrong:
            raise BadInputError(f"{folder / INDEX_NAME} and the files disagree about {_few(wrong)}", "fetch them again")
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file():
            raise BadInputError(f"{folder} lacks {name}", "copy the release's tokenizer files into it")

    expected = release.tensor_specs(config)
    mtp = [name for name in tensors if release.is_mtp(config, name)]
    _check_tensors(folder, tensors, expected, set(mtp), quantised)
    return BaseModel(folder, config, tensors, expected, mtp, files, quantised, _fingerprint(config, files))


def lacks_prediction_layer(folder: Path) -> bool:
    """Whether a model folder's index says that it holds no multi-token-prediction layer; False where it is silent."""
    try:
        names = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return not any(release.is_mtp(config, name) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # prepare_model says what is wrong with it


def _check_tensors(
    folder: Path,
    tensors: dict[str, StoredTensor],
    expected: dict[str, TensorSpec],
    mtp: set[str],
    quantised: bool,
) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise BadInputError(f"{folder} lacks tensors that config.json asks for: {_few(missing)}", "fetch it again")
    scales = {name + release.SCALE_SUFFIX for name in expected} if quantised else set()
    unknown = [n for n in tensors if n not in expected and n not in mtp and n not in scales and "inv_freq" not in n]
    if unknown:
        raise BadInputError(f"{folder} holds tensors that config.json does not know: {_few(unknown)}")
    for name, spec in expected.items():
        found = tensors[name]
        if found.spec.shape != spec.shape:
            raise BadInputError(f"{found.file}: {name} has shape {found.spec.shape}, config.json asks for {spec.shape}")
        if found.spec.dtype not in ("BF16", spec.dtype) and not (found.spec.dtype == "F8_E4M3" and quantised):
            raise BadInputError(  # the correction bias is FP32 in the release
                f"{found.file}: {name} is {found.spec.dtype}; needed is BF16 or the release's FP8",
                "convert the model to BF16 first",
            )
    for name in (name for name, tensor in tensors.items() if tensor.spec.dtype == "F8_E4M3"):
        scale = tensors.get(name + release.SCALE_SUFFIX)
        wanted = fp8_blocks.factors_spec(tensors[name].spec)
        if len(wanted.shape) != 2 or scale is None or scale.spec != wanted:
            found_text = "is missing" if scale is None else f"is {scale.spec}"
            raise BadInputError(f"{folder}: the scale of {name} {found_text}, needed is {wanted}")


def figures(model: BaseModel) -> dict[str, Any]:
    """What a receipt says about a model folder; the multi-token-prediction layer is counted apart."""
    config = model.config
    experts = sum(release.is_moe_layer(config, layer) for layer in range(config["num_hidden_layers"]))
    return {
        "parameters": sum(spec.elements for spec in model.expected.values()),
        "tensors": len(model.expected),
        "tensors_of_untrained_mtp_layer": len(model.mtp),
        "bytes": sum(path.stat().st_size for path in model.files),
        "files": len(model.files),
        "dtype": "fp8" if model.quantised else "bf16",
        "layers": config["num_hidden_layers"],
        "moe_layers": experts,
        "experts": config["n_routed_experts"],
        "hidden_size": config["hidden_size"],
        "vocab": config["vocab_size"],
    }


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
