"""The training environment reads the token files that the workflow environment wrote."""

import json
import os
import subprocess

import pytest
from unit.data.helpers import PROJECT, TOKENIZER, answer, user, write_lines

from deepseek_sft.convert import tiny_model
from deepseek_sft.data.samples import Settings
from deepseek_sft.data.tokenization import Outputs, tokenize
from deepseek_sft.data.tokens import TokenDataset

READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
from deepseek_sft.data.tokens import TokenDataset
plain = lambda value: value if isinstance(value, str) else value.tolist()
rows = [{name: plain(value) for name, value in row.items()} for row in TokenDataset(sys.argv[2])]
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "tokenizers", "transformers", "datasets"})
print(json.dumps([rows, loaded]))
"""

LOSSES = """
import json, sys
sys.path.insert(0, sys.argv[1])
from deepseek_sft.training.xtuner_engine import compat
compat.install("cpu")
from deepseek_sft.data.tokens import TokenDataset
from deepseek_sft.training.xtuner_engine.micro_batches import collate
from deepseek_sft.training.xtuner_engine.sft_model import DeepseekSFT
settings = dict(experts_per_shard=4, attention="auto", accelerator="cpu", dtype="float32", auxiliary_loss_weight=0.0)
model = DeepseekSFT(sys.argv[2], activation_checkpointing=False, **settings).train()
found = []
for folder in sys.argv[3:]:
    model.zero_grad()
    batches = collate(list(TokenDataset(folder)), 2, 8)
    losses = [model(batch) for batch in batches]
    sum(losses).backward()
    gradient = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt()
    found.append([sum(losses).item(), gradient.item(), sum(batch.trained_tokens for batch in batches)])
print(json.dumps(found))
"""


def token_folder(folder, records, pack):
    folder.mkdir()
    source = write_lines(folder / "train.jsonl", records)
    outputs = Outputs(folder / "tokens", folder / "rejects.jsonl", folder / "statistics.json")
    tokenize(source, TOKENIZER, Settings("deepseek-r1", 96), outputs, pack=pack)
    return outputs.tokens


@pytest.mark.stage("train")
def test_packed_rows_train_exactly_as_their_samples_alone(environment, tmp_path):
    records = [{"id": f"r{i}", "messages": [user("Q" * i), answer(" ".join("R" * i), f"A{i}")]} for i in range(1, 20)]
    folders = [token_folder(tmp_path / name, records, name == "packed") for name in ("packed", "alone")]
    packed = TokenDataset(folders[0])
    assert packed.info["packed"] and len(packed) < len(records) / 2
    tiny_model.write_tiny(tmp_path / "base", tiny_model.TinyShape(), 0, 80_000_000)
    command = [str(environment("train")), "-c", LOSSES, str(PROJECT / "workflow"), str(tmp_path / "base")]
    run = subprocess.run(
        [*command, *map(str, folders)],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    (loss, gradient, trained), (alone, alone_gradient, alone_trained) = json.loads(run.stdout.splitlines()[-1])
    assert trained == alone_trained == packed.info["trained_tokens"]
    assert loss == pytest.approx(alone, rel=1e-5) and gradient == pytest.approx(alone_gradient, rel=1e-5)


@pytest.mark.stage("train")
def test_training_environment_reads_the_same_rows_without_heavy_imports(environment, tmp_path):
    records = [{"id": f"r{i}", "messages": [user(f"Q{i}"), answer("R", f"A{i}")]} for i in range(20)]
    source = write_lines(tmp_path / "train.jsonl", records)
    outputs = Outputs(tmp_path / "tokens", tmp_path / "rejects.jsonl", tmp_path / "statistics.json")
    tokenize(source, TOKENIZER, Settings("deepseek-r1", 64), outputs)
    command = [str(environment("train")), "-c", READ, str(PROJECT / "workflow"), str(outputs.tokens)]
    rows, loaded = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    assert all(row["sample_lengths"] == [len(row["input_ids"])] == [len(row["labels"])] for row in rows)
    assert loaded == []
