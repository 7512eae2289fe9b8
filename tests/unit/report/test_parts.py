"""Parts of the report: metrics, drawings, units, text."""

import numpy as np
import pytest

from deepseek_sft import formatting
from deepseek_sft.data.samples import Sample
from deepseek_sft.data.statistics import Statistics
from deepseek_sft.report import (
    calibration,
    chat_section,
    collect,
    drawing,
    plots,
    plots_experts,
    plots_memory,
    plots_stages,
)


def test_later_line_of_a_repeated_step_counts_and_broken_lines_do_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 9}\n{"step": 1, "loss": 3}\nnull\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert [line["loss"] for line in collect.metrics(path)] == [3, 1]


def test_lost_loss_leaves_a_gap_not_a_failure():
    metrics = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
    steps, loss = plots.series(metrics, "loss")
    assert (steps.tolist(), loss.tolist()) == ([3.0], [2.0])
    assert [plot.name for plot in plots.training(metrics)] == ["loss"]


def test_thinned_line_keeps_its_spikes_and_ends():
    x = np.arange(100_000.0)
    y = np.ones_like(x)
    y[54_321] = 50.0
    thin_x, thin_y = drawing.thin(x, y, 500)
    assert len(thin_x) <= 502
    assert (thin_x[0], thin_x[-1], thin_y.max()) == (0.0, 99_999.0, 50.0)


def test_smoothing_neither_lags_nor_bends_a_straight_line():
    line = np.linspace(10.0, 0.0, 101)
    np.testing.assert_allclose(plots.smooth(line, 11), line, atol=1e-12)


def test_length_histogram_keeps_its_open_end_and_drops_empty_bins_before_the_first():
    bins = [{"from": 0, "below": 16, "samples": 0}, {"from": 16, "below": None, "samples": 4}]
    assert plots.histogram({"length_histogram": bins}) == [(16, None, 4)]
    assert "more" in plots.lengths({"length_histogram": bins}).svg


def test_rejected_lengths_and_the_cut_are_drawn():
    bins = [
        {"from": 0, "below": 16, "samples": 2, "too_long": 0},
        {"from": 16, "below": 32, "samples": 3, "too_long": 4},
    ]
    drawn = plots.lengths({"length_histogram": bins, "max_length": 20})
    assert "4 rejected as longer than 20 tokens" in drawn.caption and "var(--series-2)" in drawn.svg
    assert "var(--series-2)" not in plots.lengths({"length_histogram": bins[:1], "max_length": 20}).svg


def test_reasoning_is_drawn_against_answers():
    statistics = Statistics(64)
    sample = Sample("a", np.zeros(9, np.int32), np.zeros(9, np.int32), 2, (100, 0), (40, 7), False)
    statistics.add_sample(sample)
    assert "1 turns" in plots.reasoning_by_answer(statistics.report()).svg


@pytest.mark.parametrize(
    "cells", [None, [], "x", [{}], [{"reasoning": {"from": "x"}, "answer": {"from": 0}, "turns": 1}]]
)
def test_broken_reasoning_counts_draw_nothing(cells):
    assert plots.reasoning_by_answer({"reasoning_by_answer": cells}) is None


def test_every_sample_is_in_the_drawn_lengths():
    statistics = Statistics()
    statistics.lengths.extend([3, 17, 17, 1000, 2_000_000])
    assert sum(count for _, _, count in plots.histogram(statistics.report())) == 5
    assert "5 samples" in plots.lengths(statistics.report()).svg


@pytest.mark.parametrize(
    "statistics", [None, 3, [], {}, {"length_histogram": "x"}, {"length_histogram": [{"from": 1}]}]
)
def test_statistics_without_histogram_draw_nothing(statistics):
    assert plots.lengths(statistics) is None


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("parameters", 671_026_419_200, "671.0 B"),
        ("checkpoint_bytes", 7.4e12, "6.73 TiB"),
        ("bytes_read", 512, "512 B"),
        ("peak_rss_mib", 2048, "2.00 GiB"),
        ("gib_per_second", 0.5, "512.00 MiB/s"),
        ("time_to_ready_s", 0.0412, "41 ms"),
        ("seconds", 59.97, "60.0 s"),
        ("seconds", 3725, "1 h 2 min"),
        ("seconds", 200_000, "2 d 7 h"),
        ("format_rate", 0.96875, "96.88 %"),
        ("learning_rate", 2e-7, "2e-07"),
        ("tokens", 123456789, "123,456,789"),
        ("tokens_per_second", 4444.44, "4,444"),
        ("resumed", True, "yes"),
        ("resumed", None, "–"),
        ("hosts", ["a", "b"], "a, b"),
        ("loss", float("nan"), "nan"),
    ],
)
def test_unit_follows_from_the_key(key, value, text):
    assert formatting.value(key, value) == text


def test_text_loses_terminal_sequences_and_lone_surrogates():
    assert formatting.clean("a\x1b[31mb\x1b[0m\x07c\ud800") == "abc?"


# ---- expert load, memory, throughput, serving


def test_last_record_of_the_expert_load_is_drawn_and_dead_experts_are_counted():
    records = [
        {"step": step, "from_step": 1, "first_layer": 3, "load": [[1.0, dead], [0.5, 1.5]]}
        for step, dead in ((5, 1), (9, 0))
    ]
    drawn = plots_experts.last_load(records)
    assert drawn.caption == "Load of each expert by layer, steps 1 to 9; black: 1 without a token"
    assert "data:image/png;base64," in drawn.svg
    assert ">4<" in drawn.svg  # the second of the layers, which begin at 3


@pytest.mark.parametrize(
    "load", [None, [], [[]], "x", [[1, "x"]], [[1.0, -1.0]], [[1.0], [1.0, 2.0]], [[float("nan")]], [1, [2]]]
)
def test_broken_expert_load_draws_nothing(load):
    assert plots_experts.last_load([{"step": 1, "load": load}]) is None
    assert plots_experts.balance([{"step": n, "expert_load_entropy": load} for n in (1, 2)], 0) is None


def test_balance_of_a_long_run_stays_a_small_image():
    lines = [{"step": n, "expert_load_entropy": [0.9, 0.5]} for n in range(1, 20_001)]
    drawn = plots_experts.balance(lines, 1)
    assert "least 0.5" in drawn.svg
    assert len(drawn.svg) < 40_000


def test_largest_parts_of_the_memory_plan_are_named_and_the_rest_is_summed():
    parts = {f"part {n}_bytes": 10 for n in range(8)} | {"largest_bytes": 1000, "CUDA context_bytes": 500}
    svg = plots_memory.memory({"rank_memory": parts}, []).svg
    assert "largest, 1,000 B" in svg and "CUDA context, 500 B" in svg
    assert "4 smaller parts, 40 B" in svg


def test_measured_memory_stands_beside_the_plan_and_a_near_limit_is_drawn():
    plan = {"rank_memory": {"a_bytes": 70.0}, "limits": {"GPU memory per rank": {"have_bytes": 80.0}}}
    measured = [calibration.Comparison("memory of a rank", "B", 70.0, 66.0, "")]
    drawn = plots_memory.memory(plan, measured)
    assert "measured 66 B" in drawn.svg
    assert drawn.caption == "Memory as planned and as measured; dashed: the limit"
    plan["limits"]["GPU memory per rank"]["have_bytes"] = 8000.0
    assert plots_memory.memory(plan, []).caption == "Memory as planned"


@pytest.mark.parametrize("plan", [{}, {"rank_memory": 3}, {"rank_memory": {"a": "x", "b": 0}, "host_memory": []}])
def test_broken_memory_plan_draws_nothing(plan):
    assert plots_memory.memory(plan, []) is None


def test_conversion_speed_is_bytes_over_seconds():
    svg = plots_stages.throughput({"bytes_read": 6 << 30, "bytes_written": 3 << 30, "seconds": 2}).svg
    assert "3.00 GiB/s" in svg and "1.50 GiB/s" in svg
    assert plots_stages.throughput({"bytes_read": 1, "seconds": 0}) is None
    assert plots_stages.throughput({"seconds": 3}) is None


def test_serving_speed_is_in_the_order_of_requests_at_a_time():
    rows = {str(at): {"tokens_per_second": 10.0 * at, "time_to_first_token_s": 0.1} for at in (16, 2)}
    assert "20 tokens per second at 2, 160 at 16" in plots_stages.serving({"by_concurrency": rows}).svg


@pytest.mark.parametrize(
    "benchmark", [None, {}, {"by_concurrency": {"x": {}}}, {"by_concurrency": {"1": {"requests": 3}}}]
)
def test_broken_benchmark_draws_nothing(benchmark):
    assert plots_stages.serving(benchmark) is None


def test_only_samples_with_both_losses_are_drawn():
    made = [
        chat_section.Answered("q", "", "", "", base, "", "", loss)
        for base, loss in ((3.0, 1.0), (2.0, 2.5), (None, 1.0))
    ]
    assert plots_stages.before_and_after(made).caption.endswith("lower for 1 of 2")
    assert plots_stages.before_and_after(made[2:]) is None


def test_warnings_of_a_log_are_told_once(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("0: warning: clock is off\n1: warning: clock is off\nstep 1\n0: warning: spike at step 3\n")
    assert collect.log_warnings(path) == ["clock is off", "spike at step 3"]
