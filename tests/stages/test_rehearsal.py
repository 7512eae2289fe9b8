"""A rehearsal with the real trainer, from copies on the node's own disk, and its checkpoint converted. About 30 s."""

import json
import os
import re
import shutil
import subprocess

import pytest
from training_inputs import PROJECT, Trainer, make_inputs

from deepseek_sft.training import rehearsal

RANKS = 1


@pytest.fixture(scope="module")
def rehearsed(environment, tmp_path_factory):
    """Both parts of a rehearsal, trained, the first from copies on the node's disk: its trainer, with what was said."""
    work = tmp_path_factory.mktemp("rehearsal")
    shared, node = work / "shared", tmp_path_factory.mktemp("node")
    trainer = Trainer(environment("train"), make_inputs(shared / "inputs", rows=12), shared)
    trainer.settings = {"max_steps": 9, "save_every_steps": 1, "balance_bias_speed": 0.001, "warmup_ratio": 0.5}
    trainer.trace = work / "trace"
    parts = {part: ["--rehearse", part, "--receipt", str(shared / f"{part}.json")] for part in rehearsal.PARTS}
    unbroken = trainer.command(RANKS, **trainer.settings)[2:] + parts["unbroken"]
    trainer.said = {"unbroken": from_local_disk(trainer, unbroken, shared, node)}
    trainer.said["resumed"] = trainer.run(RANKS, *parts["resumed"], **trainer.settings)
    return trainer


def from_local_disk(trainer, arguments, shared, node):
    """Train as a script with node-local copies does, its calls of the file system noted where strace is there."""
    shutil.copytree(PROJECT / "workflow", shared / "workflow", ignore=shutil.ignore_patterns("__pycache__"))
    (shared / "train.tar").touch()
    own = node / "deepseek-sft"
    own.mkdir()
    (own / "train").symlink_to(trainer.python.parents[1].resolve())  # complete: it need not be unpacked
    script = shared / "workflow/scripts/local_copies.sh"
    subprocess.run(["bash", script, shared / "train.tar", own / "train", shared, own / "code"], check=True)
    scripts = own / "code/workflow/scripts"
    traced = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", trainer.trace] if shutil.which("strace") else []
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    variables |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{own}/code/workflow:{scripts}"}
    command = [*traced, own / "train/bin/python", scripts / "train.py", *arguments]
    done = subprocess.run(command, cwd=shared, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_rank_that_starts_from_its_own_disk_asks_the_shared_folder_for_little(rehearsed):
    """From its first call to its first step. The same start from a shared environment makes 170,000 calls."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    shared = str(rehearsed.work)
    lines = rehearsed.trace.read_text(errors="replace").splitlines()
    worker = next(
        i for i, line in enumerate(lines) if "execve(" in line and '"deepseek_sft.training.xtuner_eng' in line
    )
    before = {line.split()[0] for line in lines[:worker]}  # train.py and torchrun: once a node
    step = next(i for i, line in enumerate(lines) if f"{shared}/" in line and "/first_batch.txt" in line)
    calls = [(line.split()[0], re.search(r' (\w+)\(.*?"([^"]*)"', line)) for line in lines[worker:step]]
    paths = [call[2] for pid, call in calls if call and pid not in before and call[1] != "getcwd"]
    asked = [path for path in paths if path.startswith(shared) or (path and path[0] != "/")]
    assert any("/inputs/base/" in path for path in asked) and len(paths) > 10_000
    assert len(asked) <= 200


def record(trainer, part):
    return json.loads((trainer.work / f"{part}.json").read_text())


def test_steps_after_a_resume_equal_the_unbroken_ones_bit_for_bit(rehearsed):
    unbroken, resumed = (record(rehearsed, part)["metrics"] for part in ("unbroken", "resumed"))
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens")
    assert [[line[key] for key in kept] for line in resumed] == [[line[key] for key in kept] for line in unbroken[3:]]
    assert "resumed from step_3" in rehearsed.said["resumed"]


def test_it_saves_once_and_does_not_count_as_training(rehearsed):
    assert [path.name for path in rehearsed.run_folder.glob("step_*")] == ["step_3"]
    assert not rehearsed.receipt_file.exists()
    assert record(rehearsed, "unbroken")["planned_steps"] == 9


def test_the_verdict_needs_both_parts_and_frees_the_checkpoint(rehearsed, environment, tmp_path):
    """In a copy of the folder's layout; the planted fault is another loss after the resume."""
    parts, plan = tmp_path / "rehearsal/7-0", tmp_path / "refine_plan.json"
    parts.mkdir(parents=True)
    (parts.parent / "settings.json").write_text(json.dumps(rehearsed.settings | {"save_every_steps": 100}))
    options = {"accelerator": "cpu", "loss_tolerance": 1e-4, "cost_per_gpu_hour": None}
    (parts.parent / "judge.json").write_text(json.dumps({"options": options, "resources": {"nodes": 1}}))
    plan.write_text(json.dumps({"schema": 1, "rule": "refine_plan", "result": {}, "figures": {}}))
    left = parts / "runs/a/step_3"
    command = [
        *(environment("train"), PROJECT / "workflow/scripts/rehearse.py", "--rehearsal", parts),
        *("--judge", parts.parent / "judge.json", "--plan-receipt", plan, "--receipt", tmp_path / "receipt.json"),
    ]

    def judge(**changes):
        left.mkdir(parents=True, exist_ok=True)
        for part in ("unbroken", "resumed"):
            found = record(rehearsed, part)
            found["metrics"][-1] |= changes if part == "resumed" else {}
            (parts / f"{part}.json").write_text(json.dumps(found))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    assert judge() == (0, (parts.parent / "verdict.txt").read_text() + "\n")
    assert not left.exists() and json.loads((tmp_path / "receipt.json").read_text())["figures"]["steps"] == 9
    code, said = judge(loss=1.0)
    assert code == 3 and "verdict: not ready: a resumed run goes on as an unbroken one" in said
    assert not left.exists() and (tmp_path / "receipt.failed.json").exists()


def test_a_checkpoint_of_a_run_that_is_not_done_is_converted_and_verified(rehearsed, environment):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (rehearsed.run_folder / "step_3").iterdir())
    command = [
        *(environment("workflow"), PROJECT / "workflow/scripts/convert_snapshot.py", rehearsed.work),
        *("--checkpoint", "step_3", "--base", rehearsed.inputs / "base", "--dtype", "fp32", "--memory", "64MiB"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (rehearsed.work / "snapshots").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["convert_checkpoint.json", "model", "verify_model.json"]
    assert json.loads((folder / "verify_model.json").read_text())["settings"]["steps"] == 3
    assert before == sorted(
        (path.name, path.stat().st_mtime_ns) for path in (rehearsed.run_folder / "step_3").iterdir()
    )
