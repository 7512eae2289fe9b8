"""Run by the train environment's Python: the losses of some rows under a model's weights, as training leaves them.

Usage: trained_losses_probe.py MODEL DTYPE ROWS RECORD, where ROWS is a JSON list of lists of token ids.
"""

import json
import sys
from pathlib import Path

import torch

from deepseek_sft.training.xtuner_engine import compat


@torch.no_grad()
def main(model: Path, dtype: str, rows: Path, output: Path) -> None:
    """Write the record, computed by the training model on one rank."""
    compat.install("cpu")
    from deepseek_sft.data import loss_rows
    from deepseek_sft.model.attention import SDPA
    from deepseek_sft.model.training_model import build

    built = build(model, experts_per_shard=4, attention=SDPA, dtype=getattr(torch, dtype)).eval()
    found = []
    for number, tokens in enumerate(json.loads(rows.read_text())):
        ids = torch.tensor([tokens])
        hidden = built.model(input_ids=ids).last_hidden_state[0, :-1]
        losses = built.lm_head(hidden, ids[0, 1:], summed=False).tolist()
        found.append({"id": str(number), "tokens": tokens, "losses": losses, "of": len(tokens)})
    record = {"format": loss_rows.FORMAT, "dtype": dtype, "step": 1, "rows": found}
    output.write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
