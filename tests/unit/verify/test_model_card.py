"""The converted model's README.md tells what it was made from and nothing private; a folder stays usable without."""

import json
from pathlib import Path

import pytest

from deepseek_sft.verify import model_card
from deepseek_sft.verify.model_card import Licence

PROJECT = Path(__file__).resolve().parents[3]
GOLDEN = PROJECT / "tests/golden/model_card.md"
PRIVATE = "s3cret"  # stands in every path, host, user, example and name that a person chose
DIGEST = "sha256:" + "0123456789abcdef" * 4


def entry(name: str, kind: str = "sha256") -> dict:
    return {"path": f"/home/{PRIVATE}/{name}", "fingerprint": f"{kind}:{'ab12' * 16}"}


def receipt(rule: str, **parts) -> dict:
    common = {"schema": 1, "rule": rule, "inputs": {}, "settings": {}, "result": {}, "figures": {}}
    versions = {"python": "3.11.7", "workflow": "0.1.0"}
    return common | {"hosts": [f"{PRIVATE}01"], "slurm": {"job_id": "7", "partition": PRIVATE},
                     "command": [f"/home/{PRIVATE}/x.py"], "versions": versions} | parts  # fmt: skip


def chain(model: Path | str = f"/data/{PRIVATE}/model") -> dict[str, dict]:
    """Receipts of a finished chain with something private wherever there can be."""
    source, items = f"/home/{PRIVATE}/chats.jsonl", f"/home/{PRIVATE}/items.jsonl"
    examples = {"duplicate": [f"{source}:3: {PRIVATE}"]}
    found = {"path": items, "items": 500, "items_found": 2, "records": 3}
    return {
        "prepare_data": receipt(
            "prepare_data",
            inputs={source: entry("chats.jsonl"), items: entry("items.jsonl")},
            settings={"sources": [source], "fields": {PRIVATE: "ignore"}},
            figures={
                "records": 1000, "accepted": 990, "rejected": 10, "rejects": {"duplicate": 7, "contaminated": 3},
                "examples": examples, "turns": 990, "with_reasoning": 800,
                "sources": {source: {"records": 1000, "accepted": 990}},
                "unused_fields": {PRIVATE: {"records": 1, "first": source}},
                "contamination": {"policy": "reject", "sets": [found], "examples": [{"text": PRIVATE}]},
                "held_out": {"share": 0.005, "records": 5, "prompts": 5},
            },
        ),
        "tokenize_data": receipt(
            "tokenize_data",
            settings={"template": "deepseek-r1", "max_length": 4096, "history_reasoning": "split", "pack": True},
            figures={"samples": 985, "tokens": 1234567, "trained_tokens": 1000000, "rows": 400, "longest": 4096,
                     "length": {"mean": 1253.4, "p95": 3900}, "languages": {"Latin script": 985},
                     "tokenizer_fingerprint": DIGEST, "first_spelling": PRIVATE, "template_notes": [PRIVATE]},
        ),
        "prepare_model": receipt(
            "prepare_model",
            inputs={"base": entry("DeepSeek-R1", "model")},
            figures={"parameters": 671026419200, "layers": 61, "hidden_size": 7168, "experts": 256, "vocab": 129280,
                     "fingerprint": entry("", "model")["fingerprint"]},
        ),
        "train": receipt(
            "train",
            settings={"engine": "xtuner", "strategy": "zero3_offload", "learning_rate": 2e-7,
                      "adam_betas": [0.9, 0.999], "lr_schedule": "cosine", "epochs": 1, "max_steps": None,
                      "run_name": PRIVATE, "seed": 42, "environment": {"TOKEN": PRIVATE}},
            figures={"run_id": "abc", "steps": 25, "first_loss": 1.25, "last_loss": 0.875, "tokens": 1234567,
                     "world_size": 72, "nodes": 9, "trained_losses": {"rows": [{"id": PRIVATE}]}},
            versions={"python": "3.11.7", "workflow": "0.1.0", "torch": "2.13.0"},
        ),
        "convert_checkpoint": receipt(
            "convert_checkpoint",
            inputs={"checkpoint": entry("step_25", "zip")},
            settings={"dtype": "bf16", "mtp": "drop"},
            result={"model": str(model)},
        ),
    }  # fmt: skip


VERIFIED = {
    "parameters": 671026419200, "tensors": 91991, "largest_relative_change": 0.00125, "sha256": {},
    "checks": {"finite": {"passed": True, "detail": f"/home/{PRIVATE}"}, "change": {"passed": True, "detail": ""}},
}  # fmt: skip


def card(licence: Licence | None = None) -> str:
    return model_card.text(chain() | {"verify_model": {"figures": VERIFIED}}, licence or Licence("mit", DIGEST))


def test_card_equals_the_golden_one():
    assert card() == GOLDEN.read_text()


def test_nothing_private_stands_in_the_card():
    assert PRIVATE in json.dumps(chain())
    assert PRIVATE not in card()
    assert "/home" not in card()


def test_licence_that_the_base_does_not_state_is_said_to_be_unstated():
    text = card(Licence())
    assert "| licence | not stated in the base's folder |" in text
    assert "\nlicense:" not in text


@pytest.mark.parametrize(
    ("readme", "name"),
    [
        ("---\nlicense: mit\n---\n# R1", "mit"),
        ("---\nlicense: other\nlicense_name: deepseek\n---\n", "deepseek"),
        ("---\nlicense: other\n---\n", "other"),
        (f"---\nlicense: 'see /home/{PRIVATE}'\n---\n", ""),
        ("---\n[broken\n---\n", ""),
        ("# no front matter", ""),
        (None, ""),
    ],
)
def test_licence_is_read_from_the_bases_own_card(tmp_path, readme, name):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    (tmp_path / "LICENSE").write_text("text")
    found = Licence.of(tmp_path)
    assert found.name == name
    assert found.digest.startswith("sha256:")


@pytest.fixture
def folders(tmp_path):
    """(model, receipt of verify_model, base) with the receipts of a chain."""
    model, base = tmp_path / "model", tmp_path / "base"
    model.mkdir()
    base.mkdir()
    (model / "origin.json").write_text("{}")
    (tmp_path / "receipts").mkdir()
    for rule, content in chain(model).items():
        (tmp_path / f"receipts/{rule}.json").write_text(json.dumps(content))
    return model, tmp_path / "receipts/verify_model.json", base


def test_verified_folder_gets_the_card_and_again_the_same(folders):
    assert model_card.write(*folders, VERIFIED)
    first = (folders[0] / "README.md").read_bytes()
    assert model_card.write(*folders, VERIFIED)
    assert (folders[0] / "README.md").read_bytes() == first


def test_somebody_elses_readme_stays(folders):
    (folders[0] / "README.md").write_text("mine")
    assert not model_card.write(*folders, VERIFIED)
    assert (folders[0] / "README.md").read_text() == "mine"


@pytest.mark.parametrize("lost", ["prepare_data", "tokenize_data", "prepare_model", "train"])
def test_without_a_receipt_its_section_is_left_out(folders, lost):
    (folders[1].parent / f"{lost}.json").unlink()
    assert model_card.write(*folders, VERIFIED)


def test_folder_of_another_chain_gets_no_card(folders):
    (folders[1].parent / "convert_checkpoint.json").unlink()
    assert not model_card.write(*folders, VERIFIED)
    assert not (folders[0] / "README.md").exists()
