"""Promises about slow ranks: named once, with figures, after 20 steps; healthy ones never; their node is left out."""

import random
import sys
import types

import pytest
from unit.report import results as made
from unit.report.page import section

from deepseek_sft.report import build, drawing, status
from deepseek_sft.training import device_health, slow_nodes


def rates(ranks: int = 256, slow: dict[int, float] | None = None) -> list[float]:
    """Seconds per token of GPUs of which none is like another, within 6 %."""
    return [1e-6 * random.uniform(0.97, 1.03) * (slow or {}).get(rank, 1.0) for rank in range(ranks)]


def named(judge: slow_nodes.Judge, steps: int, slow: dict[int, float] | None = None, covered: int = 1) -> list:
    random.seed(7)
    return [one for step in range(covered, steps + 1, covered) for one in judge.look(step, rates(slow=slow), covered)]


def test_healthy_ranks_are_not_named_in_a_thousand_steps():
    assert named(slow_nodes.Judge(10), 1000) == []


def test_a_slow_rank_is_named_once_at_the_twentieth_step_with_its_figures():
    (slow,) = named(slow_nodes.Judge(10), 100, {13: 1.2})
    assert (slow.rank, slow.step, slow.steps) == (13, 20, 20)
    assert slow.percent == pytest.approx(20, abs=2)
    assert "rank 13 (device 5 of node2)" in slow_nodes.describe(slow, "node2", 8)


def test_steps_that_are_not_logged_count():
    (slow,) = named(slow_nodes.Judge(10), 100, {13: 1.2}, covered=8)
    assert (slow.step, slow.steps) == (24, 24)


def test_a_rank_that_recovers_begins_anew():
    judge = slow_nodes.Judge(10)
    for step in range(1, 60):
        assert judge.look(step, [1.0, 1.0, 1.0 if step % 19 == 0 else 2.0]) == []


def test_on_cpu_only_what_the_configuration_asks_for_is_judged():
    assert slow_nodes.allowed_percent(None, "cuda") == 10
    assert slow_nodes.allowed_percent(None, "cpu") is None
    assert slow_nodes.allowed_percent(50, "cpu") == 50
    assert named(slow_nodes.Judge(None), 100, {13: 9.0}) == []


def test_status_and_next_start_tell_of_a_noted_node_and_how_to_take_it_again(tmp_path):
    slow = slow_nodes.Slow(13, 20.0, 20, 120)
    slow_nodes.note(tmp_path / "train", slow, "node2", 8)
    slow_nodes.note(tmp_path / "train", slow_nodes.Slow(99, 15.0, 20, 130), "node13", 8)
    assert list(slow_nodes.read(tmp_path / "train")) == ["node2", "node13"]
    told = slow_nodes.left_out(slow_nodes.read(tmp_path / "train"), tmp_path / "train")
    assert "train leaves node2 out: rank 13 (device 5 of node2) has computed 20 % slower" in told[0]
    assert "slow_nodes.json" in told[0]
    assert [name for name, _ in status._slow_rows(tmp_path)] == ["slow", "slow"]


def test_the_report_names_slow_nodes_beside_training(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "svg", lambda figure, name, description: "<svg></svg>")
    results = made.write_results(tmp_path)
    assert "slow nodes" not in section(build.build(results, None).html, "train")
    slow_nodes.note(results / "train", slow_nodes.Slow(13, 20.0, 20, 120), "node2", 8)
    shown = section(build.build(results, None).html, "train")
    assert "rank 13 (device 5 of node2) has computed 20 % slower than the median rank for 20 steps" in shown


@pytest.mark.parametrize("text", ["", "[]", "{", '{"node2": 3}'])
def test_a_damaged_file_leaves_nobody_out(tmp_path, text):
    (tmp_path / slow_nodes.FILE).write_text(text)
    assert slow_nodes.read(tmp_path) == {}


# ------------------------------------------------------------------------------------------------------------ health


def test_what_nvidia_smi_says_is_understood():
    assert device_health.parse("1410, 1980, 0x0000000000000024, 3, 0") == device_health.Health(1410, 1980, 0x24, 3, 0)
    assert device_health.words(0x24) == ["power cap", "thermal, by software"]
    idle = device_health.parse("345, 1980, 0x0000000000000001, [N/A], [N/A]")
    assert idle == device_health.Health(-1, 1980, 0, -1, -1)


def test_looks_between_two_questions_keep_the_lowest_clock_and_every_reason():
    looks = [device_health.Health(1980, 1980, 0), device_health.Health(900, 1980, 0x40), device_health.Health(-1, 1980)]
    first, *rest = looks
    for one in rest:
        first = first.and_then(one)
    assert (first.clock_mhz, first.reasons) == (900, 0x40)


class Nvml(types.ModuleType):
    """NVML's functions as pynvml names them, of a GPU that is throttled and has told of two Xid events."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.xid = 2

    def nvmlInit(self) -> None: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, gpu: str, kinds: int, events: object) -> None:
        assert kinds == 8

    def nvmlEventSetWait_v2(self, events: object, milliseconds: int) -> None:
        if self.xid == 0:
            raise self.NVMLError("time-out")
        self.xid -= 1

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return 0x48

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return 1200

    def nvmlDeviceGetMaxClockInfo(self, gpu: str, kind: int) -> int:
        return 1980

    def nvmlDeviceGetTotalEccErrors(self, gpu: str, kind: int, counter: int) -> int:
        if kind == 0:
            raise self.NVMLError("not supported")
        return 5


def test_nvml_tells_clocks_reasons_ecc_and_xid_events():
    look = device_health.look_with_nvml(Nvml(), "GPU-1")
    assert look() == device_health.Health(1200, 1980, 0x48, -1, 5, 2)
    assert look().xid == 2


def test_where_nothing_tells_a_gpu_s_health_it_is_said_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "/nowhere")
    observer = device_health.Observer("GPU-1")
    assert observer.source == ""
    assert "pynvml" in observer.why
    assert "nvidia-smi" in observer.why
    assert observer.take() == device_health.Health()


def test_the_observer_looks_from_a_thread_until_it_is_closed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    observer = device_health.Observer("GPU-1", every=0.01)
    for _ in range(500):
        if (found := observer.take()).clock_mhz > 0:
            break
        observer._closed.wait(0.01)
    observer.close()
    assert (observer.source, found.clock_mhz) == ("NVML", 1200)
