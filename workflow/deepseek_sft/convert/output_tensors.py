"""The tensors of a model folder that is written from a base's: their names, dtypes, order and files, and its config."""

from pathlib import Path
from typing import Any

from .. import families, files
from ..data.tokenizer_files import RANKS, vocabulary_file
from ..errors import BadInputError
from ..families import config_file, rows
from ..tensors import fp8_blocks
from ..tensors.safetensors_files import Shard, lay_out, lay_out_like
from ..tensors.sizes import parse_size
from ..tensors.tensor_spec import FP8_BLOCK, INT4, SCALE_SUFFIX, TensorSpec
from .base_model import QUANTISATION_FILE, BaseModel
from .tensor_sources import Source

DTYPES = {"bf16": "BF16", "fp32": "F32", "fp8": "F8_E4M3"}
TORCH_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}  # of what is not quantised
AS_BASE = 0  # in place of the largest file size: the base's own files


def shard_size(text: str) -> int:
    """Bytes of an option like ``5GB``; ``AS_BASE`` for ``base``."""
    return AS_BASE if text == "base" else parse_size(text)


def _spec(base: BaseModel, name: str, dtype: str) -> TensorSpec:
    """What becomes of one of the base's weights."""
    stored, family = base.tensors[name].spec, families.of(base.config)
    if dtype == "fp8" and len(stored.shape) == 2 and family.is_quantised(base.config, name):
        return TensorSpec(stored.shape, "F8_E4M3")
    rounded = stored.dtype in ("F8_E4M3", INT4) or name.endswith(family.ROUTER_WEIGHT)
    kept = "BF16" if rounded else stored.dtype  # router biases are FP32 in the release
    return TensorSpec(stored.shape, "F32" if dtype == "fp32" else kept)


def output_specs(base: BaseModel, dtype: str, mtp: str) -> dict[str, TensorSpec]:
    """Every tensor of the output in order: the base's, each FP8 matrix followed by its block factors.

    Args:
        dtype: key of ``DTYPES``.
        mtp: ``drop`` or ``copy``, the multi-token-prediction layer.

    Raises:
        BadInputError: that layer is to be copied and the base has none.
    """
    if mtp == "copy" and not base.mtp:
        raise BadInputError(
            f"{base.folder} holds no multi-token-prediction layer to copy",
            "prepare the base model with --mtp copy, or convert with --mtp drop",
        )
    specs: dict[str, TensorSpec] = {}
    for name in base.weights(mtp == "copy"):
        specs[name] = _spec(base, name, dtype)
        if specs[name].dtype == "F8_E4M3":
            specs[name + SCALE_SUFFIX] = fp8_blocks.factors_spec(specs[name])
    return specs


def copied_sources(base: BaseModel, specs: dict[str, TensorSpec], names: list[str]) -> dict[str, Source]:
    """Sources of weights taken from the base; FP8 into FP8 is copied as it lies, factors and all."""
    sources = {}
    for name in names:
        factors = name + SCALE_SUFFIX
        if base.tensors[name].spec.dtype == specs[name].dtype == "F8_E4M3":
            for part in (name, factors):
                sources[part] = Source(base.tensors[part], 0, base.tensors[part].spec.shape)
        else:
            sources[name] = base.source(name)
    return sources


def output_config(base: BaseModel, dtype: str, mtp: str) -> dict[str, Any]:
    """The base's ``config.json`` with the output's dtype, quantisation and multi-token-prediction layers.

    It is decided together with the tensors: it names as many of those layers as are written, and code only where the
    base has it. The keys are those that vLLM, transformers 4.57 and 5 read (``config_file.to_serve``).

    Raises:
        BadInputError: a layer to be copied is incomplete.
    """
    served = config_file.to_serve(base.published, base.folder / "config.json")
    config = {key: value for key, value in served.items() if key != "quantization_config"}
    layers = base.mtp_layers if mtp == "copy" else 0
    values = {"torch_dtype": TORCH_DTYPES[dtype], "num_nextn_predict_layers": layers}
    config |= values | {new: values[old] for new, old in config_file.ALIASES.items() if new in config and old in values}
    without_code = vocabulary_file(base.folder).name == RANKS or config["model_type"] != rows.MODEL_TYPE
    if lacking_code(config, base.folder) or without_code:
        config.pop("auto_map", None)
    if without_code:  # the same class, under the name that servers know without code from the folder
        config["model_type"] = rows.MODEL_TYPE
    if dtype == "fp8":
        config["quantization_config"] = fp8_blocks.QUANTIZATION_CONFIG
    return config


def identity_of_config(base: BaseModel, config: dict[str, Any], dtype: str, mtp: str) -> dict[str, str]:
    """What a folder's identity says of its configuration: nothing where earlier versions wrote the same.

    Otherwise such a folder, finished by one of them, is not taken for complete.
    """
    earlier = {key: value for key, value in base.published.items() if key != "quantization_config"}
    earlier["torch_dtype"] = TORCH_DTYPES[dtype]
    if "dtype" in earlier:
        earlier["dtype"] = TORCH_DTYPES[dtype]
    if mtp == "drop":
        earlier["num_nextn_predict_layers"] = 0
    if dtype == "fp8":
        earlier["quantization_config"] = fp8_blocks.QUANTIZATION_CONFIG
    left_out = [path.name for path in sorted(base.folder.iterdir()) if QUANTISATION_FILE.fullmatch(path.name)]
    return {"config": files.digest([config, left_out])} if config != earlier or left_out else {}


def lacking_code(config: dict[str, Any], folder: Path) -> list[str]:
    """Files of code that ``auto_map`` names and the folder does not hold."""
    named = config.get("auto_map")
    if not isinstance(named, dict):
        return []
    classes = [entry for value in named.values() for entry in (value if isinstance(value, list) else [value])]
    modules = {str(entry).split("--")[-1].split(".")[0] for entry in classes if entry and "--" not in str(entry)}
    return sorted(f"{module}.py" for module in modules if not (folder / f"{module}.py").is_file())


def output_shards(base: BaseModel, specs: dict[str, TensorSpec], largest: int) -> list[Shard]:
    """The output's files of at most ``largest`` bytes, or ``AS_BASE``: named and filled as the base's."""
    if largest == AS_BASE:
        return lay_out_like(specs.items(), {name: tensor.file.name for name, tensor in base.tensors.items()})
    return lay_out(specs.items(), largest)


class Rows:
    """How many elements of each output tensor are made together: the ``row`` of ``model_writer.Plan``.

    Quantising needs whole bands of 128 rows and writes a matrix's factors beside it; dequantising needs whole rows.
    """

    def __init__(self, specs: dict[str, TensorSpec], sources: dict[str, Source]) -> None:
        self.specs, self.sources = specs, sources

    def __call__(self, name: str) -> int:
        """Elements; 0 for block factors, which come with their matrix."""
        if name not in self.sources:
            return 0
        if self.quantises(name):
            return FP8_BLOCK * self.specs[name].shape[1]
        return self.sources[name].row

    def quantises(self, name: str) -> bool:
        return self.specs[name].dtype == "F8_E4M3" and self.sources[name].dtype != "F8_E4M3"

    @property
    def largest(self) -> int:
        return max(map(self, self.specs))
