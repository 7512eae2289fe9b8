"""The training environment reads the token files that the workflow environment wrote."""

import json
import subprocess

import pytest
from unit.data_helpers import PROJECT, TOKENIZER, answer, user, write_lines

from deepseek_sft.data.samples import Settings
from deepseek_sft.data.tokenization import Outputs, tokenize

READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
from deepseek_sft.data.tokens import TokenDataset
plain = lambda value: value if isinstance(value, str) else value.tolist()
rows = [{name: plain(value) for name, value in row.items()} for row in TokenDataset(sys.argv[2])]
loaded = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "tokenizers", "transformers", "datasets"})
print(json.dumps([rows, loaded]))
"""


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
