"""Promises of whole training runs: same result however spread, exact resume, true exit codes."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
from training_inputs import Trainer, make_inputs, ranks_of, tensors_of

from deepseek_sft import receipts

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent
STEPS = 20
BALANCE = {"balance_bias_speed": 0.01}  # part of what a checkpoint must bring back


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def trainer(environment, inputs, tmp_path_factory):
    def make() -> Trainer:
        return Trainer(environment("train"), inputs, tmp_path_factory.mktemp("run"))

    return make


@pytest.fixture(scope="module")
def uninterrupted(trainer):
    """20 steps on 2 ranks that share each sequence, 4 rows a step."""
    run = trainer()
    run.run(2, sequence_parallel_size=2, micro_batch_size=4, max_steps=STEPS, **BALANCE)
    return run


@pytest.fixture(scope="module")
def spread(trainer):
    """One step on the same 4 rows, with the balance loss, spread in different ways."""
    ways = {
        "one rank": (1, {"micro_batch_size": 4}),
        "sequence split": (2, {"micro_batch_size": 4, "sequence_parallel_size": 2}),
        "rows and micro batches": (2, {"micro_batch_size": 1, "gradient_accumulation_steps": 2}),
    }
    runs = {}
    for way, (ranks, settings) in ways.items():
        runs[way] = trainer()
        runs[way].run(ranks, max_steps=1, max_grad_norm=1e6, auxiliary_loss_weight=0.01, **settings)
    return runs


def test_loss_does_not_depend_on_how_a_step_is_spread(spread):
    first, *others = [run.losses()[0] for run in spread.values()]
    assert others == pytest.approx([first] * len(others), rel=1e-6)


def test_losses_left_with_the_final_weights_do_not_depend_on_how_they_are_spread(spread):
    """Every way computes them with its own weights, which differ in rounding alone."""
    first, *others = [run.receipt["figures"]["trained_losses"]["rows"] for run in spread.values()]
    for other in others:
        assert [row["tokens"] for row in other] == [row["tokens"] for row in first]
        for one, two in zip(first, other, strict=True):
            assert two["losses"] == pytest.approx(one["losses"], abs=1e-3), one["id"]


@pytest.mark.parametrize("way", ["sequence split", "rows and micro batches"])
def test_every_gradient_is_the_same_however_a_step_is_spread(spread, way, environment):
    folders = [str(spread[name].run_folder / "step_1") for name in ("one rank", way)]
    command = [str(environment("train")), str(STAGES / "training_states.py"), *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    differences = json.loads(result.stdout.splitlines()[-1])
    name, worst = max(differences.items(), key=lambda item: item[1])
    assert worst < 1e-4, name


def test_a_run_that_is_killed_stopped_and_terminated_ends_with_the_losses_of_an_uninterrupted_one(
    trainer, uninterrupted
):
    run = trainer()
    settings = {"sequence_parallel_size": 2, "micro_batch_size": 4, "max_steps": STEPS, "save_every_steps": 3} | BALANCE

    process = run.start(2, **settings)
    run.wait_for(process, lambda: run.steps_done() >= 5)
    ranks_of(process)[1].kill()
    text = run.finish(process, expected=5)
    assert "rank 1 (killed" in text
    killed_at = run.steps_done()

    process = run.start(2, **settings)
    run.wait_for(process, lambda: run.steps_done() > killed_at)
    process.send_signal(signal.SIGUSR1)
    text = run.finish(process, expected=4)
    stopped_at = run.steps_done()
    assert f"stopped on request after step {stopped_at} of {STEPS}" in text
    assert (run.run_folder / f"step_{stopped_at}" / "committed.json").exists()

    process = run.start(2, **settings)
    run.wait_for(process, lambda: run.steps_done() > stopped_at)
    process.terminate()
    run.finish(process, expected=143)

    run.run(2, **settings)
    assert run.losses() == uninterrupted.losses()
    assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
    assert run.receipt["figures"]["resumed_from_step"] >= stopped_at
    for key in ("first_loss", "last_loss", "tokens", "trained_tokens"):
        assert run.receipt["figures"][key] == uninterrupted.receipt["figures"][key]
    kept = sorted(path.name for path in run.run_folder.glob("step_*"))
    assert kept == ["step_18", "step_20"]
    markers = [json.loads((run.run_folder / name / "committed.json").read_text()) for name in kept]
    assert ["trained_losses" in marker for marker in markers] == [False, True]


def test_a_run_that_validates_and_ends_early_trains_as_one_that_does_not(trainer, uninterrupted):
    """No loss ever falls by so much: after the first measurement, patience alone counts."""
    run, stop = trainer(), {"patience": 2, "min_delta": 50.0}
    settings = {"sequence_parallel_size": 2, "micro_batch_size": 4, "max_steps": STEPS, "save_every_steps": 4} | BALANCE
    validation = {"every_steps": 2, "samples": 1000, "early_stop": stop}

    text = run.run(2, validation=validation, **settings)
    assert (
        "has not fallen by more than 50 in 2 measurements" in text and f"the run ends after step 6 of {STEPS}" in text
    )
    base, *steps = run.metrics()
    assert without_times(steps) == without_times(uninterrupted.metrics()[:6])
    assert without_times([base]) == [{"step": 0}], "measured before the first step, which is no step"
    measured = {line["step"]: line["validation_loss"] for line in run.metrics() if "validation_loss" in line}
    figures = run.receipt["figures"]
    assert list(measured) == [0, 2, 4, 6]
    assert (figures["validation_first_step"], figures["validation_first_loss"]) == (0, measured.pop(0))
    assert (figures["ended_early"], figures["steps"], figures["planned_steps"]) == (True, 6, STEPS)
    best = min((4, 6), key=measured.get)
    assert (figures["converted_step"], figures["converted_validation_loss"]) == (best, measured[best])
    assert run.receipt["result"]["checkpoint"] == str(run.run_folder / f"step_{best}")
    assert figures["trained_losses"]["step"] == best

    assert "finished already" in run.run(2, validation=validation, **settings)
    assert run.receipt["figures"]["validation_lowest_loss"] == min(measured.values())


VARYING = ("seconds", "per_second", "tflops", "mfu", "memory", "allocator", "validation")


def without_times(lines):
    """Metrics without what differs from run to run, and without the columns of validation."""
    return [{key: value for key, value in line.items() if not any(word in key for word in VARYING)} for line in lines]


def test_training_lowers_the_loss(uninterrupted):
    figures = uninterrupted.receipt["figures"]
    assert figures["last_loss"] < figures["first_loss"] - 0.5


def test_the_marker_says_what_conversion_needs(uninterrupted):
    folder = Path(uninterrupted.receipt["result"]["checkpoint"])
    marker = json.loads((folder / "committed.json").read_text())
    assert folder.name == f"step_{STEPS}"
    assert marker["run_id"] == uninterrupted.receipt["figures"]["run_id"]
    assert marker["world_size"] == 2
    assert marker["parameter_prefix"] == "llm."
    assert marker["experts"] == {"layout": "w1w3_w2", "experts_per_shard": 4}
    assert marker["files"] == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "committed.json"}
    assert len(marker["files"]) == 4


def test_the_last_marker_and_the_receipt_hold_the_losses_of_eight_rows_under_the_final_weights(uninterrupted):
    folder = Path(uninterrupted.receipt["result"]["checkpoint"])
    left = json.loads((folder / "committed.json").read_text())["trained_losses"]
    assert left == uninterrupted.receipt["figures"]["trained_losses"]
    assert (left["step"], left["dtype"], len(left["rows"])) == (STEPS, "float32", 8)
    assert all(len(row["losses"]) == len(row["tokens"]) - 1 == row["of"] - 1 for row in left["rows"])


def test_a_finished_run_is_recognised_and_its_receipt_written_again(uninterrupted):
    before = uninterrupted.receipt
    uninterrupted.receipt_file.unlink()
    text = uninterrupted.run(2, sequence_parallel_size=2, micro_batch_size=4, max_steps=STEPS, **BALANCE)
    assert "finished already" in text
    assert uninterrupted.receipt["figures"] == before["figures"]


def test_a_begun_run_refuses_ranks_that_make_another_batch_with_what_to_do(trainer):
    run = trainer()
    settings = {"micro_batch_size": 4, "max_steps": 50}
    process = run.start(1, **settings)
    run.wait_for(process, lambda: run.steps_done() >= 1)
    process.send_signal(signal.SIGUSR1)
    run.finish(process, expected=4)
    text = run.run(2, expected=2, **settings)
    assert "was trained in steps of 4 rows, this start would go on with 8" in text
    assert "on_new_topology: continue" in text and "run_name" in text


def test_a_first_loss_above_its_limit_stops_this_and_later_starts_until_the_limit_is_raised(trainer):
    run = trainer()
    settings = {"micro_batch_size": 4, "max_steps": 2}
    assert "above train.first_loss_max 1.0" in run.run(1, expected=3, first_loss_max=1.0, **settings)
    assert not list(run.run_folder.glob("step_*"))
    assert "failed a gate before" in run.run(1, expected=3, first_loss_max=1.0, **settings)
    run.run(1, first_loss_max=20.0, **settings)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(trainer):
    run = trainer()
    text = run.run(1, expected=3, learning_rate=1e30, micro_batch_size=2, max_steps=5, save_every_steps=5)
    assert "is nan" in text or "is inf" in text
    assert not list(run.run_folder.glob("step_*"))


def test_a_stop_file_saves_and_while_it_is_there_nothing_starts(trainer, tmp_path):
    run, stop = trainer(), tmp_path / "stop"
    settings = {"micro_batch_size": 2, "max_steps": 200}
    process = run.start(1, "--stop-file", str(stop), **settings)
    run.wait_for(process, lambda: run.steps_done() >= 1)
    stop.touch()
    run.finish(process, expected=4)
    assert "exists" in run.run(1, "--stop-file", str(stop), expected=4, **settings)


def on_two_nodes(run: Trainer, job: str, *more: str, **settings) -> tuple:
    """Start one rank on each of two nodes; the processes of both and where the second writes."""
    variables = {"SLURM_JOB_ID": job, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2"}
    variables["GLOO_SOCKET_IFNAME"] = "lo"
    second = run.start(1, *more, environment=variables | {"SLURM_NODEID": "1"}, **settings)
    told = run.log
    return run.start(1, *more, environment=variables | {"SLURM_NODEID": "0"}, **settings), second, told


SPREAD_EXPERTS = {
    "sequence_parallel_size": 1,
    "micro_batch_size": 2,
    "max_steps": 8,
    "save_every_steps": 3,
    "strategy": "zero3_offload",
    "expert_parallel_size": 2,
} | BALANCE


@pytest.fixture(scope="module")
def two_nodes(trainer):
    """8 steps on two nodes of one rank, between which experts are spread."""
    run = trainer()
    first, second, _ = on_two_nodes(run, "777", **SPREAD_EXPERTS)
    run.finish(first, expected=0)
    run.finish(second, expected=0)
    return run


def test_two_nodes_train_together_and_the_first_writes_the_receipt(two_nodes, uninterrupted):
    assert two_nodes.receipt["figures"]["nodes"] == 2
    assert two_nodes.receipt["figures"]["world_size"] == 2
    assert two_nodes.losses() == pytest.approx(uninterrupted.losses()[:8], rel=1e-5)


def planned_over(ranks: int, folder: Path) -> tuple[str, str]:
    """Options of a start after a plan that spreads experts over so many ranks."""
    plan = folder / f"over-{ranks}/refine_plan.json"
    figures = {"expert_parallel_size": ranks, "checkpoint_s": None, "loading_s": None, "step_slowest_s": None}
    receipts.write(plan, "refine_plan", inputs={}, settings={}, result={}, figures=figures)
    return "--plan-receipt", str(plan)


def test_a_kill_on_one_of_two_nodes_between_which_experts_are_spread_changes_no_bit(trainer, two_nodes, tmp_path):
    """Begun with the plan's choice, which it keeps although the plan that it goes on after chooses otherwise."""
    run, settings = trainer(), SPREAD_EXPERTS | {"expert_parallel_size": "auto"}
    first, second, told = on_two_nodes(run, "779", *planned_over(2, tmp_path), **settings)
    run.wait_for(first, lambda: run.steps_done() >= 4)
    ranks_of(second)[0].kill()
    run.finish(first, expected=5)
    assert second.wait(60) == 5, told.read_text()
    assert run.steps_done() < 8

    first, second, told = on_two_nodes(run, "780", *planned_over(1, tmp_path), **settings)
    run.finish(first, expected=0)
    assert second.wait(60) == 0, told.read_text()
    kept = json.loads((run.run_folder / "settings.json").read_text())
    assert (kept["settings"]["expert_parallel_size"], kept["stated"]["expert_parallel_size"]) == (2, "auto")
    assert run.receipt["figures"]["resumed_from_step"] in (3, 6)
    assert run.losses() == two_nodes.losses()
    ended, wanted = (sorted(part[1:] for part in tensors_of(one.run_folder / "step_8")) for one in (run, two_nodes))
    assert ended == wanted, "sizes and checksums, which a resumed run's file holds in another order"


def test_a_termination_that_reaches_the_nodes_one_after_the_other_is_no_crash(trainer):
    run = trainer()
    settings = {"sequence_parallel_size": 1, "micro_batch_size": 2, "max_steps": 10_000}
    first, second, told = on_two_nodes(run, "778", **settings)
    run.wait_for(first, lambda: run.steps_done() > 0)
    first.terminate()
    run.finish(first, expected=143)
    assert second.wait(60) == 143, told.read_text()  # its rank has lost its peer; a signal never came
    assert "node 1 ends because " in told.read_text()
