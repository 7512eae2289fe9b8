"""Promises about time-outs: what is healthy by the plan is ended by none of them, and they follow from one another."""

import re
import sys
import time
import types

import planning_plans as plans
import pytest

from deepseek_sft import time_limits
from deepseek_sft.errors import GateError
from deepseek_sft.planning import duration, gate, plan_text
from deepseek_sft.training import watchdog

SLOW = {"node_gb_per_second": 50, "storage_gb_per_second": 2}
SIGNAL = {"signal_lead_s": 3600, "slurm_extra": "--signal=USR1@3600 --exclusive", "runtime_minutes": 720}


def published(**changes):
    return plans.published(32, 4, "zero3_offload", 2, **changes)


def test_the_published_run_on_slow_networks_is_planned_with_limits_that_let_it_live():
    plan = published(**SLOW)
    planned = duration.planned(plan.duration)
    found = time_limits.before_measuring(planned)
    assert planned.step > 1800, "under the limits of before a healthy step would have been ended"
    assert planned.save > 3600
    for phase in time_limits.PHASES:
        assert found[phase] >= 4 * getattr(planned, phase)
    assert time_limits.collectives(found) > max(found.values())
    assert gate.limit_problems(plan, None) == []
    assert f"step {plan_text.show(found['step'], 's')}" in plan_text.text(plan)


def test_a_plan_s_receipt_gives_the_same_limits_as_the_plan():
    plan = published(**SLOW)
    from_receipt = time_limits.before_measuring(time_limits.Planned.of_figures(plan_text.figures(plan)))
    assert from_receipt == pytest.approx(time_limits.before_measuring(duration.planned(plan.duration)), rel=1e-3)


def test_without_a_plan_limits_are_those_of_old():
    assert time_limits.before_measuring(time_limits.Planned()) == {"start": 3600, "step": 1800, "save": 3600}


def test_a_stated_limit_holds_and_the_others_are_derived():
    found = time_limits.before_measuring(time_limits.Planned(step=2000), {"start": None, "step": 90, "save": 3})
    assert found == {"start": 3600, "step": 5400, "save": 180}


@pytest.mark.parametrize("phase", time_limits.PHASES)
def test_a_stated_limit_that_would_end_what_is_healthy_is_refused_with_figures(phase):
    with pytest.raises(GateError) as error:
        gate.check_limits(published(**SLOW), {phase: 45}, "fail")
    slowest = getattr(duration.planned(published(**SLOW).duration), phase)
    assert f"train.hang_minutes.{phase}: 45 minutes" in str(error.value)
    assert f"{slowest / 60:.1f}" in str(error.value)
    gate.check_limits(published(**SLOW), {phase: int(slowest / 30) + 1}, "fail")


def test_a_signal_that_comes_too_late_to_save_is_refused_with_the_one_to_write():
    slow = published(**SLOW, **SIGNAL)
    with pytest.raises(GateError) as error:
        gate.check_limits(slow, None, "fail")
    lead = int(re.search(r'"--signal=USR1@(\d+) --exclusive"', str(error.value))[1])
    planned = duration.planned(slow.duration)
    assert lead >= planned.step + planned.save
    gate.check_limits(published(**SLOW, **(SIGNAL | {"signal_lead_s": lead})), None, "fail")
    gate.check_limits(slow, None, "warn")


def test_a_signal_is_not_judged_where_the_slowest_run_ends_before_it():
    plan = published(**SLOW, **(SIGNAL | {"runtime_minutes": 10**6}))
    assert plan.duration.run is not None
    assert gate.limit_problems(plan, None) == []


def test_the_published_run_on_its_own_network_is_refused_nothing():
    assert gate.limit_problems(published(**SIGNAL), {"start": 60, "step": 30, "save": 60}) == []


def test_measured_times_replace_planned_ones_from_the_fourth_step_on(tmp_path):
    dog = watchdog.Watchdog(0, tmp_path, {"start": 3600, "step": 9000, "save": 7200}, time_limits.PHASES)
    try:
        for seconds in (900, 400, 400):
            assert dog.limits["step"] == 9000
            dog.took("step", seconds)
        assert dog.limits["step"] == 1600
        dog.took("save", 30)
        assert dog.limits["save"] == 1600, "what follows a save's files may take as long as a step"
        for _ in range(20):
            dog.took("step", 1.0)
        assert dog.limits["step"] == time_limits.FLOOR
        for _ in range(200):
            dog.took("step", 5000)
        assert dog.limits["step"] == 9000, "no longer than collectives were told"
    finally:
        dog.close()


def test_a_stated_limit_is_not_moved_by_measured_times(tmp_path):
    dog = watchdog.Watchdog(0, tmp_path, {"start": 3600, "step": 9000, "save": 7200}, ("start", "save"))
    try:
        for _ in range(10):
            dog.took("step", 1)
        assert dog.limits["step"] == 9000
    finally:
        dog.close()


@pytest.mark.parametrize("others", [{}, {"_dump_fr_trace": lambda: b"nothing: gloo's"}])
def test_the_flight_recorder_of_nccl_is_written_where_torch_has_one(others, tmp_path, monkeypatch):
    module = types.SimpleNamespace(_dump_nccl_trace=lambda: b"collectives", **others)
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", module)
    told = watchdog.dump_flight_recorder(tmp_path / "logs" / "trace")
    assert (tmp_path / "logs" / "trace").read_bytes() == b"collectives"
    assert "trace" in told


def test_a_flight_recorder_that_hangs_does_not_keep_the_rank(tmp_path, monkeypatch):
    module = types.SimpleNamespace(_dump_fr_trace=lambda: time.sleep(30))
    monkeypatch.setitem(sys.modules, "torch._C._distributed_c10d", module)
    assert "did not answer within 0.1 s" in watchdog.dump_flight_recorder(tmp_path / "trace", 0.1)


@pytest.mark.parametrize("ranks", [1, 8, 256, 2048])
def test_preflight_s_limits_grow_with_the_ranks_and_stay_within_its_job(ranks):
    found = time_limits.under_load(ranks)
    assert found.loading >= 300 + ranks
    assert found.joining > found.loading, "other nodes may still import torch"
    if ranks <= 256:
        assert found.total + 600 < 3600, "preflight's own job has an hour, timeout_s of it for the nodes by themselves"


def test_train_py_refuses_a_stated_limit_against_its_plan():
    found = time_limits.problems(time_limits.Planned(step=1200), {"step": 30}, None, True)
    assert "train.hang_minutes.step: 30 minutes, but the plan's slowest step takes 20.0" in found[0][0]
    assert "at least 40" in found[0][1]
