"""A model of the DeepSeek-V3 architecture that says the same few words to everybody, without any training.

Attention and experts compute as usual but their outputs are multiplied by zero, so that the next token follows from the
last one alone: whatever was asked, the model thinks, closes its reasoning, answers and ends. Servers can be tested with
it as with a trained model, in the seconds that it takes to write one.
"""

import json
from pathlib import Path

import numpy as np

from deepseek_sft.tensors import number_formats, safetensors_files

WORDS = ("Let", "Ġme", "Ġthink", "</think>", "The", "Ġanswer", "Ġis", "Ġ", "5", "<｜end▁of▁sentence｜>")
REASONING, ANSWER = "Let me think", "The answer is 5"
SILENCED = ("o_proj.weight", "down_proj.weight")  # the last matrix of attention, dense layers and experts
LOGIT = 2.0  # × √hidden: likely, not certain, so that log-probabilities are worth comparing


def script(model: Path) -> None:
    """Turn a model folder written by ``prepare_model --tiny`` into one that says WORDS."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    words = [ids[word] for word in WORDS]
    for file in model.glob("*.safetensors"):
        for name, tensor in safetensors_files.read_header(file).items():
            if name.endswith(SILENCED):
                _write(tensor, np.zeros(tensor.spec.shape, np.float32))
            elif name == "model.embed_tokens.weight":
                values = np.zeros(tensor.spec.shape, np.float32)
                values[:, 0] = 1  # every token that is not in the script is followed by its first word
                for step, word in enumerate(words[:-1], start=1):
                    values[word] = np.eye(1, values.shape[1], step)
                _write(tensor, values)
            elif name == "lm_head.weight":
                values = np.zeros(tensor.spec.shape, np.float32)
                for step, word in enumerate(words):
                    values[word, step] = LOGIT
                _write(tensor, values)


def _write(tensor: safetensors_files.StoredTensor, values: np.ndarray) -> None:
    assert tensor.spec.dtype == "BF16"
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(number_formats.float32_to_bf16(values).tobytes())
