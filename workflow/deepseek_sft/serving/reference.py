"""Log-probabilities by transformers, as the reference for the served model.

``python -m deepseek_sft.serving.reference REQUEST ANSWER``: a process of its own, so that its memory is free again.
Request (JSON): ``{"model_dir", "dtype", "sequences": [[token id, …], …]}``; answer: ``{"logprobs": [[float, …], …],
"top": [[token id, …], …]}`` with, for each sequence, the log-probability of token ``i + 1`` given those up to ``i``,
and the likeliest token there.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def main(request: Path, answer: Path) -> None:
    """Compute what ``request`` asks for and write it to ``answer``."""
    wanted = json.loads(request.read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        wanted["model_dir"], dtype=getattr(torch, wanted["dtype"]), attn_implementation="eager"
    ).eval()
    logprobs, top = [], []
    with torch.no_grad():
        for sequence in wanted["sequences"]:
            ids = torch.tensor([sequence])
            distribution = model(ids).logits[0, :-1].float().log_softmax(-1)
            logprobs.append(distribution.gather(1, ids[0, 1:, None])[:, 0].tolist())
            top.append(distribution.argmax(-1).tolist())
    answer.write_text(json.dumps({"logprobs": logprobs, "top": top}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
