"""Promises of the comparison of plan and run in the report."""

import json

import pytest

from deepseek_sft.report import build, calibration
from deepseek_sft.report.collect import Stage

GIB = 1 << 30
PLAN = {
    "nodes": 2,
    "ranks": 4,
    "checkpoint_bytes": 1000,
    "rank_memory_bytes": 10 * GIB,
    "rank_memory": {"process_bytes": GIB},
    "host_memory_bytes": 22 * GIB,
    "host_memory": {"ranks_bytes": 20 * GIB, "node_bytes": 2 * GIB},
}
RUN = {"checkpoint_bytes": 1010, "peak_memory_gib": 11.0, "steps": 10, "seconds": 50.0}


def compared(plan: dict, run: dict, metrics: list | None = None) -> dict[str, calibration.Comparison]:
    stages = [Stage(rule, "complete", receipt={"figures": f}) for rule, f in (("plan", plan), ("train", run))]
    return {one.name: one for one in calibration.compare(*stages, metrics or [])}


def test_memory_and_checkpoint_are_compared_on_cpu():
    found = compared(PLAN, RUN)
    assert found["one checkpoint"].difference_share == pytest.approx(0.01)
    assert found["memory of a rank"].difference_share == pytest.approx(0.1)
    assert found["host memory of a node"].measured == 22 * GIB  # two ranks a node
    assert found["host memory of a node"].difference_share == pytest.approx(0.1)
    assert "10.0% more" in found["memory of a rank"].text()


def test_on_gpus_the_peak_is_compared_with_what_pytorch_counts_and_host_memory_with_resident_size():
    parts = {"allocator slack_bytes": GIB, "CUDA context_bytes": GIB, "NCCL buffers_bytes": 2 * GIB}
    plan = PLAN | {"rank_memory": parts, "step_fastest_s": 4.0, "step_slowest_s": 8.0}
    found = compared(plan, RUN | {"peak_memory_gib": 6.0}, [{"host_memory_gib": 9.0}, {"host_memory_gib": 10.0}])
    assert found["memory of a rank"].difference_share == pytest.approx(0)
    assert found["host memory of a node"].measured == 20 * GIB
    assert found["one step"].text().endswith("inside (mean over the run)")


def test_parts_of_a_rank_that_are_constants_of_the_plan_are_compared_one_by_one():
    parts = {"process_bytes": GIB, "freed memory that glibc keeps_bytes": 2 * GIB}
    measured = RUN | {"memory_before_model_gib": 1.25, "kept_by_allocator_gib": 1.0}
    found = compared(PLAN | {"rank_memory": parts}, measured)
    assert found["a rank's process"].difference_share == pytest.approx(0.25)
    assert found["freed memory that the C library keeps"].difference_share == pytest.approx(-0.5)
    host = PLAN | {"rank_memory": {}, "host_memory": {"processes_bytes": 4 * GIB}}
    assert compared(host, measured)["a rank's process"].difference_share == pytest.approx(-0.375)  # two ranks a node


def test_time_outside_its_range_is_measured_from_the_nearer_end():
    plan = PLAN | {"rank_memory": {}, "step_fastest_s": 6.0, "step_slowest_s": 8.0}
    assert compared(plan, RUN)["one step"].difference_share == pytest.approx(5 / 6 - 1)


def test_what_is_missing_or_broken_is_left_out():
    assert compared({}, {}) == {}
    odd = {"checkpoint_bytes": "x", "rank_memory": 3, "host_memory_bytes": 5, "host_memory": {"node_bytes": "?"}}
    assert compared(odd, {"checkpoint_bytes": None, "peak_memory_gib": True}) == {}


def test_report_shows_plan_beside_measurement(tmp_path):
    results = tmp_path / "results" / "one"
    (results / "receipts").mkdir(parents=True)
    for rule, figures in (("plan", PLAN), ("train", RUN)):
        content = {"schema": 1, "rule": rule, "result": {}, "figures": figures}
        (results / "receipts" / f"{rule}.json").write_text(json.dumps(content))
    report = build.build(results, None)
    assert "planned against measured" in report.html
    assert "planned 1,000 B, measured 1,010 B: 1.0% more" in report.html
    assert report.figures["calibration"]["one checkpoint"] == 0.01
