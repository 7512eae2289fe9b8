"""Snakemake never says that all is done where a receipt or a result of the chain has gone. Dry runs; about a minute."""

import re
import shutil
from pathlib import Path

import pytest
from finished_chain import Chain

REPORT = [".envs/workflow/bin/python", "workflow/scripts/build_report.py", "results/mine"]
NOTHING = "Nothing to be done"


@pytest.fixture
def chain(project: Path, tmp_path: Path) -> Chain:
    return Chain(project, tmp_path)


def would_run(said: str) -> list[str]:
    """Rules of the table of jobs."""
    table = re.search(r"Job stats:\n.*?\ntotal", said, re.DOTALL)
    return sorted(set(re.findall(r"^(\w+) +\d+$", table[0], re.MULTILINE)) - {"all", "total"}) if table else []


def test_finished_chain_has_nothing_to_do(chain):
    before = chain.files()
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert NOTHING in said
    assert chain.files() == before


def test_report_by_hand_writes_no_receipt_and_hides_no_unfinished_stage(chain):
    for rule in ("train", "convert_checkpoint", "verify_model", "smoke_test", "build_report"):
        chain.receipt(rule).unlink()
    code, said = chain.run(REPORT)
    assert code == 0, said
    assert (chain.results / "report.html").exists()
    assert not chain.receipt("build_report").exists()
    code, said = chain.run([*REPORT, "--receipt", "results/mine/receipts/build_report.json"])
    assert code == 2
    assert "the chain is not complete: train, convert_checkpoint, verify_model, smoke_test" in said
    assert not chain.receipt("build_report").exists()
    code, said = chain.snakemake("-n")
    assert would_run(said) == ["build_report", "convert_checkpoint", "smoke_test", "train", "verify_model"], said


@pytest.mark.parametrize("rule", ["prepare_data", "plan", "refine_plan", "train", "verify_model", "smoke_test"])
def test_missing_receipt_below_later_ones_runs_its_stage(chain, rule):
    chain.receipt(rule).unlink()
    before = chain.files()
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert rule in would_run(said), said
    assert chain.files() == before


def test_receipt_that_cannot_be_read_runs_its_stage(chain):
    chain.receipt("verify_model").write_text('{"rule": "ver')
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert {"verify_model", "smoke_test", "build_report"} <= set(would_run(said))
    assert said.rstrip().endswith("verify_model runs again: its receipt cannot be read")


def test_deleted_report_is_written_again(chain):
    (chain.results / "report.html").unlink()
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert would_run(said) == ["build_report"]
    code, said = chain.snakemake()
    assert code == 0, said
    assert (chain.results / "report.html").stat().st_size > 5_000
    assert chain.snakemake("-n")[1].count(NOTHING) == 1


def test_removed_model_is_converted_again_where_the_checkpoint_is_there(chain):
    shutil.rmtree(chain.results / "model")
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert would_run(said) == ["build_report", "convert_checkpoint", "smoke_test", "verify_model"]
    assert "convert_checkpoint runs again: model results/mine/model has gone" in said


def test_removed_checkpoint_of_a_verified_model_trains_nothing(chain):
    shutil.rmtree(chain.results / "train/runs/a/step_9")
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert NOTHING in said


def test_model_and_checkpoint_gone_is_refused_with_the_command_and_trains_nothing(chain):
    shutil.rmtree(chain.results / "model")
    shutil.rmtree(chain.results / "train/runs/a/step_9")
    for more in (["-n"], []):
        code, said = chain.snakemake(*more)
        assert code == 1
        assert "the checkpoint of the finished training, results/mine/train/runs/a/step_9, has gone" in said
        assert "--forcerun train" in said
        assert "Traceback" not in said
        assert len(said.splitlines()) <= 10, said
    for more in (["plan"], ["--forcerun", "train"]):
        code, said = chain.snakemake("-n", *more)
        assert code == 0, said
    assert "train" in would_run(said)


def test_conversion_that_lost_its_checkpoint_is_refused_before_any_job(chain):
    shutil.rmtree(chain.results / "train/runs/a/step_9")
    code, said = chain.snakemake("-n", "--forcerun", "convert_checkpoint")
    assert code == 1
    assert "convert_checkpoint needs it" in said
    assert chain.receipt("convert_checkpoint").exists()


def test_finished_training_never_starts_again_because_its_checkpoint_was_removed(chain):
    shutil.rmtree(chain.results / "train/runs/a/step_9")
    chain.receipt("tokenize_data").touch()
    for more in (["-n"], []):
        code, said = chain.snakemake(*more)
        assert code == 1
        assert "training is done (9 steps), but its checkpoint" in said
        assert "--forcerun train" in said
    code, said = chain.snakemake("-n", "--forcerun", "train")
    assert code == 0, said
    assert "train" in would_run(said)


def test_removed_token_files_are_named_and_train_nothing(chain):
    shutil.rmtree(chain.results / "data/tokens")
    code, said = chain.snakemake("-n")
    assert code == 0, said
    assert NOTHING in said
    assert "tokens results/mine/data/tokens of tokenize_data has gone" in said.splitlines()[-1]
    assert "--forcerun tokenize_data" in said.splitlines()[-1]
