"""Promises of training runs when something breaks: hangs, kills inside a save, bad steps, early signals, early ends."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training_inputs import Trainer, make_inputs, ranks_of

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent
SETTINGS = {"sequence_parallel_size": 2, "micro_batch_size": 4, "max_steps": 9, "save_every_steps": 3}


@pytest.fixture(scope="module")
def trainer(environment, tmp_path_factory):
    inputs = make_inputs(tmp_path_factory.mktemp("inputs"))

    def make() -> Trainer:
        return Trainer(environment("train"), inputs, tmp_path_factory.mktemp("run"))

    return make


def block_second_save(run: Trainer) -> Path:
    """Have rank 1 hang when it opens its file of step 6: a pipe that nobody reads."""
    folder = run.run_folder / "step_6"
    folder.mkdir()
    os.mkfifo(folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    return folder


def test_a_hang_and_a_kill_inside_a_save_lose_no_checkpoint_and_no_step(trainer):
    undisturbed = trainer()
    undisturbed.run(2, **SETTINGS)
    run = trainer()

    process = run.start(2, **SETTINGS, hang_minutes={"start": 5, "step": 5, "save": 0.05})
    # Written once old checkpoints are set aside; the ranks have not started.
    run.wait_for(process, lambda: any(run.work.glob("train/runs/*/settings.json")))
    block_second_save(run)
    text = run.finish(process, expected=5)
    assert "hang: rank 1 on " in text
    assert "in step 7 (commit)" in text  # step 6 is written while step 7 computes
    assert "deferred_files.py" in text  # where the thread stands that writes
    assert (run.run_folder / "step_3" / "committed.json").exists()

    process = run.start(2, **SETTINGS)
    run.wait_for(process, lambda: (run.run_folder / "step_6.incomplete").exists())
    folder = block_second_save(run)
    run.wait_for(process, lambda: len(list(folder.iterdir())) > 2)
    ranks_of(process)[0].kill()
    text = run.finish(process, expected=5)
    assert "without a last word on this node: rank 0 (killed" in text
    assert not (folder / "committed.json").exists()
    assert (run.run_folder / "step_3" / "committed.json").exists()

    text = run.run(2, **SETTINGS)
    assert "step_6 does not count (no commit marker)" in text
    assert run.losses() == undisturbed.losses()
    assert sorted(path.name for path in run.run_folder.glob("step_*")) == ["step_6", "step_9"]


ENDINGS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    time.sleep(5)
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
"""


def test_the_killed_rank_is_known_also_when_torchrun_ends_the_others_before_they_speak(environment, tmp_path):
    (tmp_path / "rank.py").write_text(ENDINGS)
    command = [str(environment("train")), "-m", "deepseek_sft.training.torchrun", str(tmp_path / "endings.json")]
    command += ["--nproc-per-node", "3", str(tmp_path / "rank.py")]
    done = subprocess.run(command, cwd=STAGES.parents[1] / "workflow", capture_output=True, text=True, check=False)
    assert done.returncode == 1
    # Rank 2 was killed as well, but by torchrun and half a minute later.
    assert json.loads((tmp_path / "endings.json").read_text()) == {"0": -15, "1": -9, "2": -15}, done.stderr


SLOW_RANK = """
import os
if "LOCAL_RANK" in os.environ:
    from types import SimpleNamespace
    from deepseek_sft.training import health
    health.statistics = SimpleNamespace(median=lambda norms: 1e-9 * min(norms))  # so that every gradient is a spike
if os.environ.get("RANK") == "1" and "LOCAL_RANK" in os.environ:
    import time
    import torch
    product = torch.nn.Linear.forward
    def slower(self, tokens):
        time.sleep(0.01)
        return product(self, tokens)
    torch.nn.Linear.forward = slower
"""


@pytest.fixture(scope="module")
def long_run(trainer, tmp_path_factory):
    """23 steps on two ranks, and what was said: rank 1 is slow; after the first 20 every gradient counts as a spike."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(SLOW_RANK)
    run = trainer()
    policy = {"spike_factor": 2.0, "on_spike": "skip", "slow_rank_percent": 30}
    production = {"strategy": "zero3_offload", "dtype": "bfloat16"}
    settings = {"micro_batch_size": 4, "max_steps": 23, "save_every_steps": 20} | policy | production
    return run, run.run(2, environment={"PYTHONPATH": str(folder)}, **settings)


def test_a_skipped_update_leaves_weights_and_moments_as_they_were(long_run, environment):
    run, _ = long_run
    assert [line["update"] for line in run.metrics()] == ["applied"] * 20 + ["skipped"] * 3
    assert run.receipt["figures"]["skipped_steps"] == 3
    folders = [str(run.run_folder / name) for name in ("step_20", "step_23")]
    command = [str(environment("train")), str(STAGES / "same_state.py"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.splitlines()[-1]).values()) == {0.0}


def test_a_slow_rank_is_named_and_its_node_noted(long_run):
    run, text = long_run
    (warning,) = [line for line in text.splitlines() if "slower than the median rank" in line]
    assert "rank 1 (device 1 of " in warning
    assert "for 20 steps" in warning
    (entry,) = json.loads((run.work / "train" / "slow_nodes.json").read_text()).values()
    assert entry["rank"] == 1
    assert 20 <= entry["step"] <= 23


def test_a_start_says_its_limits(long_run):
    assert "limits: start 60 min, step 30 min, save 60 min; a collective 70 min" in long_run[1]


def test_every_line_holds_what_each_rank_computed_without_waiting_for_the_slow_one(long_run):
    lines = long_run[0].metrics()
    healthy, slow = (sum(line["compute_seconds"][rank] for line in lines) for rank in (0, 1))
    assert all(len(line["compute_seconds"]) == 2 and min(line["compute_seconds"]) > 0 for line in lines)
    assert slow > 1.3 * healthy
    assert slow < sum(line["seconds"] for line in lines)


def test_steps_that_are_not_finite_are_skipped_where_that_is_wanted_until_none_is_good(trainer):
    run = trainer()
    text = run.run(1, expected=3, learning_rate=1e30, micro_batch_size=2, max_steps=30, on_not_finite="skip")
    assert "its update was skipped" in text
    assert "10 steps before it were skipped as well" in text
    lines = run.metrics()
    assert lines[-1]["update"] == "skipped"
    assert lines[-1]["loss"] is None


def test_a_run_saves_by_minutes_ends_by_hours_and_goes_on_with_more_of_them(trainer):
    run = trainer()
    settings = {"micro_batch_size": 4, "max_steps": 100_000, "save_every_steps": 100_000, "log_every_steps": 1}
    settings |= {"save_every_minutes": 0.01, "keep_checkpoints": 100}
    run.run(1, **settings, max_hours=8 / 3600)
    figures = run.receipt["figures"]
    assert 1 < figures["steps"] < figures["planned_steps"] == 100_000
    assert figures["wall_seconds"] >= 8
    assert figures["trained_losses"]["step"] == figures["steps"]
    assert len(list(run.run_folder.glob("step_*/committed.json"))) >= 3
    assert "finished already" in run.run(1, **settings, max_hours=8 / 3600)
    run.run(1, **settings, max_hours=(figures["wall_seconds"] + 3) / 3600)
    assert run.receipt["figures"]["resumed_from_step"] == figures["steps"]
    assert run.receipt["figures"]["run_id"] == figures["run_id"]


def test_the_stop_signal_is_kept_from_the_first_moment_on(trainer):
    run = trainer()
    log = run.work / "early.log"
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # inherited, as from the rendered script's trap
    try:
        with open(log, "w") as stream:
            process = subprocess.Popen(run.command(1, max_steps=1000), stderr=stream, stdout=stream)
    finally:
        signal.signal(signal.SIGUSR1, before)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.005)
    assert process.wait(60) == 4, log.read_text()
    assert "stopped on request" in log.read_text()


def test_a_rank_that_cannot_even_import_is_a_crash_with_its_reason(trainer, tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('broken installation')\n")
    run = trainer()
    process = run.start(1, environment={"PYTHONPATH": str(tmp_path)})
    text = run.finish(process, expected=5)
    assert "ImportError: broken installation" in text


def test_what_a_person_reads_before_spending_gpu_hours_is_there(trainer):
    run = trainer()
    text = run.run(1, micro_batch_size=2, max_steps=1, gpu_tflops=1e-3)
    assert "sampled weights equal the base on all ranks" in text
    checks = json.loads((run.run_folder / "start_checks.json").read_text())
    assert checks["problems"] == []
    assert checks["ranks"][0]["elements"] > 5000
    shown = (run.run_folder / "first_batch.txt").read_text()
    assert shown.count("== micro batch 0, row") == 2
    line = run.metrics()[0]
    assert 0 < line["mfu"] < 1
    assert sum(line[f"seconds_{phase}"] for phase in ("data", "forward", "backward", "update")) <= line["seconds"]
    layers = 2  # of the three, the first is dense
    for key in ("expert_load_entropy", "dead_experts", "busiest_expert_load"):
        assert len(line[key]) == layers
    assert all(0 < entropy <= 1 for entropy in line["expert_load_entropy"])
    record = json.loads((run.run_folder / "expert_load.jsonl").read_text())
    assert (record["step"], record["from_step"], record["first_layer"], len(record["load"])) == (1, 1, 1, layers)
    for load, busiest, dead in zip(record["load"], line["busiest_expert_load"], line["dead_experts"], strict=True):
        assert sum(load) / len(load) == pytest.approx(1, abs=1e-3)
        assert (max(load), load.count(0)) == (pytest.approx(busiest, abs=1e-3), dead)


def test_the_clock_samples_every_kind_of_layer_and_groups_get_the_run_s_time_out(environment):
    command = [str(environment("train")), str(STAGES / "compute_clock_probe.py")]
    path = {"PYTHONPATH": str(STAGES.parents[1] / "workflow")}
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["timed"], told["kinds"]) == (64, 8)
    assert told["rows"] == 64 * 10, "tokens times layers"
    assert told["seconds"] > 0
    assert told["after"] == [0, 0]
    assert told["timeout_hours"] == 5, "torch's own are 10 minutes for NCCL and 30 for gloo"
