"""Log-probabilities and greedy answers by transformers, as the reference for the served model.

``python -m deepseek_sft.evaluation.transformers_reference REQUEST ANSWER``: a process of its own, so that its memory is
free again.
Request (JSON): a list of ``{"model_dir", "dtype", "sequences": [[token id, …], …], "prompts": [[token id, …], …],
"max_new_tokens", "eos_token_ids"}``, one for each model. Answer: a list of ``{"logprobs": [[float, …], …],
"generated": [[token id, …], …]}`` with, for each sequence, the log-probability of token ``i + 1`` given those up to
``i``, and for each prompt the tokens that follow it, to the first end-of-sentence token or the limit.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import json_files
from ..families import rows


def main(request: Path, answer: Path) -> None:
    """Compute what ``request`` asks for and write it to ``answer``."""
    transformers.logging.set_verbosity_error()
    answer.write_text(json.dumps([compute(job) for job in json_files.load(request, list)]))


def class_of(folder: Path) -> Any:
    """The class that config.json names; its ``model_type`` may be one that transformers knows with the folder's code.

    Kimi-K2's is; no code of a model folder is run.
    """
    known = json_files.load(folder / "config.json").get("architectures") == [rows.ARCHITECTURE]
    return transformers.DeepseekV3ForCausalLM if known else transformers.AutoModelForCausalLM


@torch.no_grad()
def compute(job: dict[str, Any]) -> dict[str, Any]:
    """One model's part of the answer; the model is freed at the end."""
    model = (
        class_of(Path(job["model_dir"]))
        .from_pretrained(job["model_dir"], dtype=getattr(torch, job["dtype"]), attn_implementation="eager")
        .eval()
    )
    logprobs = []
    for sequence in job["sequences"]:
        ids = torch.tensor([sequence])
        distribution = model(ids).logits[0, :-1].float().log_softmax(-1)
        logprobs.append(distribution.gather(1, ids[0, 1:, None])[:, 0].tolist())
    generated = []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=job["max_new_tokens"],
            eos_token_id=job["eos_token_ids"],
            pad_token_id=job["eos_token_ids"][0],
        )
        generated.append(whole[0, len(prompt) :].tolist())
    return {"logprobs": logprobs, "generated": generated}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
