"""A base model's folder: which tensors it holds where, and whether that is complete."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import families, files, json_files
from ..data import tokenizer_files
from ..errors import BadInputError
from ..tensors import fp8_blocks, int4_groups
from ..tensors.safetensors_files import INDEX_NAME, StoredTensor, read_header
from ..tensors.tensor_spec import FP8_BLOCK, INT4, SCALE_SUFFIX, TensorSpec
from .tensor_sources import Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
QUANTISATION_FILE = re.compile(r"(hf_)?quant\w*\.json")  # of modelopt, AWQ, GPTQ and others
FUSED_EXPERTS = re.compile(r".+\.mlp\.experts\.(gate_up_proj|down_proj)")
MUST_BE_JSON = ("tokenizer", "special_tokens", "added_tokens", "generation_config")
LARGE_JSON = 1 << 20  # bytes
SAMPLES, SAMPLE_SIZE = 16, 4096  # blocks of each weight file that enter the fingerprint


@dataclass(frozen=True)
class BaseModel:
    """A checked model folder.

    Attributes:
        config: its ``config.json`` in the releases' names.
        published: its ``config.json`` as it lies there.
        tensors: name → where it lies, in the order of files and of offsets in them.
        expected: name → shape and dtype by the config, without the multi-token-prediction layer.
        mtp: names of the multi-token-prediction layer's tensors; they are not trained.
        files: weight files in order.
        quantised: whether it is the FP8 block format, or INT4 of compressed-tensors.
        groups: scales of each INT4 matrix.
        fingerprint: over config, headers and sampled blocks of the weights.
    """

    folder: Path
    config: dict[str, Any]
    published: dict[str, Any]
    tensors: dict[str, StoredTensor]
    expected: dict[str, TensorSpec]
    mtp: list[str]
    files: list[Path]
    quantised: bool
    fingerprint: str
    groups: dict[StoredTensor, StoredTensor] = field(default_factory=dict)

    def weights(self, mtp: bool) -> list[str]:
        """Names of the trained tensors in the order in which they lie in the folder; on demand with those of MTP."""
        copied = {name for name in self.mtp if not name.endswith(SCALE_SUFFIX)} if mtp else set()
        return [name for name in self.tensors if name in self.expected or name in copied]

    @property
    def mtp_layers(self) -> int:
        """Number of multi-token-prediction layers that it holds.

        Raises:
            BadInputError: one of them lacks a tensor, or one is skipped.
        """
        try:
            return families.of(self.config).mtp_layers(self.config, self.mtp)
        except ValueError as error:
            raise BadInputError(
                f"{self.folder}: the multi-token-prediction layer cannot be copied: {error}",
                "fetch the files of that layer again, or leave it out: --mtp drop",
            ) from None

    def source(self, name: str) -> Source:
        """Where a weight's values are read, dequantised if it is FP8 or INT4."""
        stored = self.tensors[name]
        if stored.spec.dtype == INT4:
            return Source(stored, 0, stored.spec.shape, self.groups[stored])
        factors = self.tensors[name + SCALE_SUFFIX] if stored.spec.dtype == "F8_E4M3" else None
        return Source(stored, 0, stored.spec.shape, factors)


def companions(folder: Path) -> list[Path]:
    """Files of a model folder that belong to a model made from it: tokenizer, generation, templates, code.

    Its configuration is made anew. Files that describe how the base's weights are quantised or indexed stay behind:
    vLLM reads ``hf_quant_config.json`` wherever it lies.
    """
    found = []
    for path in sorted(folder.iterdir()):
        is_weight = path.suffix in (".safetensors", ".bin", ".pt") or path.name.endswith(".index.json")
        if is_weight or path.suffix not in (".json", ".py", ".jinja", ".model") or not path.is_file():
            continue
        if path.name not in ("config.json", "origin.json") and not QUANTISATION_FILE.fullmatch(path.name):
            found.append(path)
    return found


def check_companions(folder: Path, vocabulary: int) -> None:
    """
    Args:
        vocabulary: tokens that the model knows; a tokenizer made of ``tiktoken.model`` must not have more.

    Raises:
        BadInputError: the tokenizer is missing or has more tokens, or a file cannot be read or is no JSON: said first,
            not after hours.
    """
    for name in TOKENIZER_FILES:
        if not (folder / name).is_file() and not (
            name == "tokenizer.json" and (folder / tokenizer_files.RANKS).is_file()
        ):
            raise BadInputError(f"{folder} lacks {name}", "copy the release's tokenizer files into it")
    if tokenizer_files.vocabulary_file(folder).name == tokenizer_files.RANKS:
        special = json_files.parse(tokenizer_files.tokenizer_text(folder).encode(), dict)["added_tokens"]
        last = max(special, key=lambda token: token["id"])
        if last["id"] >= vocabulary:
            raise BadInputError(
                f"{folder}: its tokenizer has {last['content']} at {last['id']}, "
                f"config.json says vocab_size {vocabulary}",
                "fetch tokenizer and config.json of one release",
            )
    for path in companions(folder):
        files.refuse_pointer(path)
        if path.name.startswith(MUST_BE_JSON) and path.suffix == ".json" and not _is_json(path):
            raise BadInputError(f"{path} is cut or is no JSON", "fetch this file again")


def _is_json(path: Path) -> bool:
    """Parsed where small; of a large one, a tokenizer's vocabulary, first and last character are looked at."""
    content = path.read_bytes()
    if len(content) > LARGE_JSON:
        return content.lstrip()[:1] == b"{" and content.rstrip()[-1:] == b"}"
    try:
        return isinstance(json_files.parse(content, None), dict | list)
    except ValueError:
        return False


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files in order, and the index's map if there is an index."""
    index = folder / INDEX_NAME
    if not index.exists():
        if (folder / "model.safetensors").is_file():
            return ["model.safetensors"], None
        raise BadInputError(f"{folder} holds neither {INDEX_NAME} nor model.safetensors", "fetch the model again")
    try:
        weight_map = json_files.load(index)["weight_map"]
        return sorted(set(weight_map.values())), weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{index} cannot be read: {error!r}", "fetch this file again") from None


def _fingerprint(published: dict[str, Any], paths: list[Path]) -> str:
    hasher = hashlib.sha256(json.dumps(published, sort_keys=True).encode())
    for path in paths:
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
    """Whether the folder is in the release's FP8 block format, or in INT4 of compressed-tensors.

    Raises:
        BadInputError: it is quantised in some other way.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return False
    if int4_groups.is_format(settings):
        return True
    block = [FP8_BLOCK] * 2
    known = isinstance(settings, dict) and settings.get("quant_method") == "fp8"
    if not known or settings.get("weight_block_size") != block:
        raise BadInputError(
            f"{folder / 'config.json'}: quantization_config is {settings}; only the release's FP8 format with blocks "
            f"of {block}, and INT4 of compressed-tensors (pack-quantized, symmetric, groups of {int4_groups.GROUP}), "
            "can be dequantised",
            "use the official release or a BF16 copy of it",
        )
    return True


def open_model(folder: Path) -> BaseModel:
    """Read and check a model folder: files, index, names, shapes and dtypes.

    Args:
        folder: Hugging Face model folder of the DeepSeek-V3 architecture.

    Raises:
        BadInputError: what is missing, cut or of the wrong shape, with the first few names.
    """
    published = families.published_config(folder)
    config = families.checked(published, folder / "config.json")
    quantised = is_quantised(config, folder)
    names, weight_map = _weight_files(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInputError(f"{folder} is incomplete: {_few(missing)} of {len(names)} files missing", "fetch them")
    paths = [folder / name for name in names]
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise BadInputError(f"{path}: {name} lies also in {tensors[name].file.name}", "remove one of the files")
            tensors[name] = tensor
    if weight_map is not None:
        wrong = [n for n, file in weight_map.items() if n not in tensors or tensors[n].file.name != file]
        wrong += [n for n in tensors if n not in weight_map]
        if wrong:
            raise BadInputError(f"{folder / INDEX_NAME} and the files disagree about {_few(wrong)}", "fetch them again")
    tensors, groups = int4_groups.fold(tensors)
    check_companions(folder, config["vocab_size"])
    family = families.of(config)
    expected = family.tensor_specs(config)
    mtp = [name for name in tensors if family.is_mtp(config, name)]
    _check_tensors(folder, tensors, expected, set(mtp), quantised, family.ROUTER_WEIGHT)
    return BaseModel(
        folder, config, published, tensors, expected, mtp, paths, quantised, _fingerprint(published, paths), groups
    )


def lacks_prediction_layer(folder: Path) -> bool:
    """Whether a model folder's index says that it holds no multi-token-prediction layer; False where it is silent."""
    try:
        names = json_files.load(folder / INDEX_NAME)["weight_map"]
        config = json_files.load(folder / "config.json")
        family = families.of(config)
        return not any(family.is_mtp(config, name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, BadInputError):
        return False  # prepare_model says what is wrong with it


def _check_tensors(
    folder: Path,
    tensors: dict[str, StoredTensor],
    expected: dict[str, TensorSpec],
    mtp: set[str],
    quantised: bool,
    router_weight: str,
) -> None:
    fused = next((name for name in tensors if FUSED_EXPERTS.fullmatch(name)), None)
    if fused:
        raise BadInputError(
            f"{folder} holds {fused}: all experts of a layer in one tensor, as transformers 5 keeps them in memory",
            "save the model again with save_pretrained(…, save_original_format=True), or take the release",
        )
    codes = next((name for name, tensor in tensors.items() if tensor.spec.dtype == "F8_E4M3"), None)
    if codes and not quantised:
        raise BadInputError(
            f"{folder} holds FP8 weights ({codes}), but its config.json has no quantization_config",
            "take quantization_config from the release's config.json: "
            '{"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}',
        )
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise BadInputError(f"{folder} lacks tensors that config.json asks for: {_few(missing)}", "fetch it again")
    scales = {name + SCALE_SUFFIX for name in expected} if quantised else set()
    unknown = [n for n in tensors if n not in expected and n not in mtp and n not in scales and "inv_freq" not in n]
    if unknown:
        raise BadInputError(
            f"{folder} holds tensors that config.json does not know: {_few(unknown)}",
            "take config.json from the release that the weights are of",
        )
    for name, spec in expected.items():
        found = tensors[name]
        if found.spec.shape != spec.shape:
            raise BadInputError(f"{found.file}: {name} has shape {found.spec.shape}, config.json asks for {spec.shape}")
        allowed = {"BF16", spec.dtype} | ({"F32"} if name.endswith(router_weight) else set())
        if found.spec.dtype not in allowed and not (found.spec.dtype in ("F8_E4M3", INT4) and quantised):
            raise BadInputError(  # the correction bias is FP32 in the release
                f"{found.file}: {name} is {found.spec.dtype}; needed is BF16 or the release's FP8",
                "convert the model to BF16 first",
            )
    for name in (name for name, tensor in tensors.items() if tensor.spec.dtype == "F8_E4M3"):
        scale = tensors.get(name + SCALE_SUFFIX)
        wanted = fp8_blocks.factors_spec(tensors[name].spec)
        if len(wanted.shape) != 2 or scale is None or scale.spec != wanted:
            found_text = "is missing" if scale is None else f"is {scale.spec.dtype} {list(scale.spec.shape)}"
            raise BadInputError(
                f"{folder}: the scale of {name} {found_text}, needed is {wanted.dtype} {list(wanted.shape)}",
                "take the release's files",
            )


def figures(model: BaseModel) -> dict[str, Any]:
    """What a receipt says about a model folder; the multi-token-prediction layer is counted apart."""
    config = model.config
    experts = sum(families.of(config).is_moe_layer(config, layer) for layer in range(config["num_hidden_layers"]))
    return {
        "parameters": sum(spec.elements for spec in model.expected.values()),
        "tensors": len(model.expected),
        "tensors_of_untrained_mtp_layer": len(model.mtp),
        "bytes": sum(path.stat().st_size for path in model.files),
        "files": len(model.files),
        "dtype": "int4" if model.groups else "fp8" if model.quantised else "bf16",
        "layers": config["num_hidden_layers"],
        "moe_layers": experts,
        "experts": config["n_routed_experts"],
        "hidden_size": config["hidden_size"],
        "vocab": config["vocab_size"],
    }


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
