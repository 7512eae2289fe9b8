"""Parts of the report: metrics, drawings, units, text."""

import numpy as np
import pytest

from deepseek_sft.data.samples import Sample
from deepseek_sft.data.statistics import Statistics
from deepseek_sft.report import collect, drawing, formatting, plots


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
