"""Small models computed by transformers, beside the server: the model that is served, and the base it came from."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import json_files
from ..python_path import with_library
from .api import CheckFailed

# Largest mean difference of log-probabilities to transformers, by the dtype of the weights.
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
TIMEOUT_S = 900


@dataclasses.dataclass(frozen=True)
class Job:
    """What one model is asked; see ``transformers_reference``."""

    model_dir: str
    dtype: str
    sequences: list[list[int]]
    prompts: list[list[int]]
    max_new_tokens: int
    eos_token_ids: list[int]


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder in the releases' form, read as far as the checks need it."""

    path: Path

    def parameters(self) -> int:
        """Number of parameters, from the safetensors files' headers alone."""
        total = 0
        for file in sorted(self.path.glob("*.safetensors")):
            with open(file, "rb") as stream:
                header = json_files.parse(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    size = 1
                    for length in entry["shape"]:
                        size *= length
                    total += size
        return total

    def too_large(self, limit: float) -> str:
        """Why transformers is not asked, empty if it is."""
        parameters = self.parameters()
        if parameters > limit:
            return f"{parameters:.3g} parameters, above smoke_test.logprobs_max_parameters {limit:.3g}"
        return ""

    def dtype(self, served: str) -> str:
        """Dtype the server computes in: what it was told, or with ``auto`` that of config.json, FP32 in 16 bits."""
        if served != "auto":
            return {"float": "float32", "half": "float16"}.get(served, served)
        config = self._json("config.json")
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        return "bfloat16" if stored == "float32" else stored  # as vLLM does on devices that compute in BF16

    def format(self, served: str) -> str:
        """``fp8`` for a model in the release's FP8 format, else the dtype that the server computes in."""
        quantisation = self._json("config.json").get("quantization_config")
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        return str(method) if method else self.dtype(served)

    def vocabulary(self) -> int | None:
        """Number of tokens that the model knows; None where config.json does not say."""
        size = self._json("config.json").get("vocab_size")
        return size if isinstance(size, int) and size > 1 else None

    def eos_token_ids(self) -> list[int]:
        """Tokens that end an answer, as servers read them; empty where the folder names none."""
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = self._json(name).get("eos_token_id")
            found += value if isinstance(value, list) else [value] if isinstance(value, int) else []
        return found

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return json_files.load(path) if path.exists() else {}


def compute(jobs: list[Job]) -> list[dict[str, Any]]:
    """Answers to the jobs; see ``transformers_reference``.

    Raises:
        CheckFailed: transformers failed or took too long.
    """
    environment = os.environ | {"PYTHONPATH": with_library(os.environ)}
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        command = [sys.executable, "-m", f"{__package__}.transformers_reference", str(request), str(answer)]
        try:
            child = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"transformers needed more than {TIMEOUT_S} s") from None
        if child.returncode or not answer.exists():
            raise CheckFailed(f"transformers failed with exit code {child.returncode}: {child.stderr[-1500:]}")
        return json_files.load(answer, list)


def agreement(served: list[list[float]], reference: list[list[float]], dtype: str) -> str:
    """How far the server's log-probabilities are from transformers'.

    Raises:
        CheckFailed: further than the dtype's tolerance, in the mean.
    """
    differences = [
        abs(ours - theirs)
        for row, expected in zip(served, reference, strict=True)
        for ours, theirs in zip(row, expected, strict=True)
    ]
    mean, largest = sum(differences) / len(differences), max(differences)
    tolerance = LOGPROB_TOLERANCE.get(dtype, LOGPROB_TOLERANCE["bfloat16"])
    figures = f"mean difference {mean:.5f}, largest {largest:.5f} over {len(differences)} tokens, {dtype}"
    if not mean < tolerance:
        raise CheckFailed(f"{figures}; expected a mean below {tolerance}")
    return figures
