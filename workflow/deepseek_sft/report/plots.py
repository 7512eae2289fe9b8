"""Plots of data and training: loss, gradient norm, speed, memory, lengths of samples."""

import itertools
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter

from . import drawing
from .drawing import FIRST, INK, PAGE, SECOND, Plot

SMOOTHED_FROM = 20  # points


def training(metrics: list[dict[str, Any]]) -> list[Plot]:
    """Loss with learning rate, gradient norm, speed and memory over steps, as far as the metrics hold them."""
    plots = []
    steps, loss = series(metrics, "loss")
    if len(steps):
        plots.append(
            _loss(steps, loss, *series(metrics, "learning_rate"), validated=series(metrics, "validation_loss"))
        )
    for key, name, caption, title in (
        ("grad_norm", "grad-norm", "Gradient norm before clipping", "gradient norm"),
        ("tokens_per_second", "speed", "Tokens per second, all ranks", "tokens / s"),
        ("useful_slots", "slots", "Share of token slots that hold a token: the rest is padding and waiting", "share"),
        ("memory_gib", "memory", "Memory of the rank with the most, in GiB", "GiB"),
    ):
        steps, values = series(metrics, key)
        if len(steps):
            figure, (axes,) = drawing.figure()
            drawing.line(axes, steps, values, FIRST)
            drawing.steps_axis(axes)
            drawing.y_axis(axes, drawing.compact, from_zero=key != "grad_norm" and values.min() >= 0)
            axes.set_ylabel(title)
            plots.append(Plot(name, caption, drawing.svg(figure, name, f"{caption} over {len(steps)} steps")))
    return plots


def _loss(
    steps: np.ndarray,
    loss: np.ndarray,
    rate_steps: np.ndarray,
    rate: np.ndarray,
    validated: tuple[np.ndarray, np.ndarray],
) -> Plot:
    figure, axes = drawing.figure((2.4, 1), 3.3) if len(rate) else drawing.figure()
    caption = "Loss per step"
    if len(steps) >= SMOOTHED_FROM:
        drawing.line(axes[0], steps, loss, FIRST, linewidth=1.0, alpha=0.4)
        window = smoothing_window(len(steps))
        drawing.line(axes[0], steps, smooth(loss, window), FIRST)
        caption = f"Loss per step (thin) and its moving average over {window} points"
    else:
        drawing.line(axes[0], steps, loss, FIRST)
    if len(validated[0]):
        drawing.line(axes[0], *validated, SECOND, marker="o", markersize=3)
        caption += "; circles: validation loss of the held-out samples"
    drawing.y_axis(axes[0], drawing.compact)
    axes[0].set_ylabel("nats a token")
    if len(rate):
        axes[1].set_ylabel("rate")
        caption += "; below: learning rate"
        axes[0].tick_params(bottom=False)
        drawing.line(axes[1], rate_steps, rate, SECOND)
        drawing.y_axis(axes[1], lambda value: "0" if value == 0 else f"{value:.2g}", from_zero=True, ticks=2)
    drawing.steps_axis(axes[-1])
    text = f"Loss over {len(steps)} steps, from {loss[0]:.4g} to {loss[-1]:.4g}"
    return Plot("loss", caption, drawing.svg(figure, "loss", text))


def lengths(statistics: Any) -> Plot | None:
    """Histogram of sample lengths from statistics.json, with what the cut rejected; None where it holds none."""
    bins = histogram(statistics)
    if not bins:
        return None
    figure, (axes,) = drawing.figure()
    counts = [count for _, _, count in bins]
    rejected = [_too_long(statistics, low) for low, _, _ in bins]
    # Bins double in width, so equal bars are a logarithmic axis that can begin at 0.
    style = {"width": 1, "align": "edge", "edgecolor": PAGE, "linewidth": 0.6}
    axes.bar(range(len(bins)), counts, color=FIRST, **style)
    cut = statistics.get("max_length")
    if drawing.is_number(cut) and any(low < cut and (high is None or cut <= high) for low, high, _ in bins):
        axes.axvline(_position(bins, cut), color=INK, linewidth=1, linestyle="--")
    edges = [drawing.compact(low) for low, _, _ in bins] + [
        "more" if bins[-1][1] is None else drawing.compact(bins[-1][1])
    ]
    every = 1 + len(bins) // 10
    axes.set_xticks(range(0, len(edges), every), edges[::every])
    axes.set_xlabel("tokens in a sample")
    drawing.y_axis(axes, drawing.compact, from_zero=True)
    axes.set_ylabel("samples")
    caption = "Samples by length"
    if any(rejected):
        axes.bar(range(len(bins)), rejected, bottom=counts, color=SECOND, **style)
        caption += f" (second colour: {sum(rejected):,} rejected as longer than {cut:,} tokens, the dashed line)"
    return Plot("lengths", caption, drawing.svg(figure, "lengths", f"{caption}: {sum(counts):,} samples"))


def reasoning_by_answer(statistics: Any) -> Plot | None:
    """Trained turns by tokens of reasoning and of answer, as circles whose area is their number; None without any."""
    entries = statistics.get("reasoning_by_answer") if isinstance(statistics, dict) else None
    try:
        cells = [(entry["reasoning"]["from"], entry["answer"]["from"], entry["turns"]) for entry in entries or []]
    except (KeyError, TypeError):
        return None
    if not cells or not all(drawing.is_number(number) and number >= 0 for cell in cells for number in cell):
        return None
    # The middle of a bin that doubles in width, in powers of two; bin 0 reaches to 16.
    reasoning, answers = (np.log2([max(cell[axis], 8) * 1.5 for cell in cells]) for axis in (0, 1))
    turns = np.array([cell[2] for cell in cells], dtype=np.float64)
    figure, (axes,) = drawing.figure()
    axes.scatter(reasoning, answers, s=250 * turns / max(turns.max(), 1), color=FIRST, alpha=0.7, linewidths=0)
    for axis, name, positions in (
        (axes.xaxis, "tokens of reasoning", reasoning),
        (axes.yaxis, "tokens of answer", answers),
    ):
        low, high = int(np.floor(positions.min() - 0.2)), int(np.ceil(positions.max() + 0.2))
        every = 1 + (high - low) // 7
        axis.set_major_locator(FixedLocator(list(range(low, high + 1, every))))
        axis.set_major_formatter(FuncFormatter(lambda value, _: drawing.compact(round(2**value))))
        axis.set_label_text(name)
        axis.set_view_interval(low, high, ignore=True)
    caption = "Trained turns by length of reasoning and answer"
    return Plot("reasoning", caption, drawing.svg(figure, "reasoning", f"{caption}: {int(turns.sum()):,} turns"))


def _too_long(statistics: Any, low: int) -> int:
    """Samples of one bin of the histogram that were rejected as too long."""
    entry = next(entry for entry in statistics["length_histogram"] if entry.get("from") == low)
    return entry["too_long"] if drawing.is_number(entry.get("too_long")) else 0


def _position(bins: list[tuple[int, int | None, int]], length: float) -> float:
    """Where a length lies on the axis of bins that double in width."""
    number, (low, high, _) = next(
        (n, one) for n, one in enumerate(bins) if one[0] < length and (one[1] is None or length <= one[1])
    )
    return number + (length - low) / ((high or 2 * length) - low)


def histogram(statistics: Any) -> list[tuple[int, int | None, int]]:
    """Bins (from, below, samples) of ``length_histogram`` without empty ones at the start; empty if there is none.

    The last bin may be open: its ``below`` is None.
    """
    entries = statistics.get("length_histogram") if isinstance(statistics, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return []
    bins = [(entry.get("from"), entry.get("below"), entry.get("samples")) for entry in entries]
    sound = all(
        drawing.is_number(low) and drawing.is_number(count) and (high is None or drawing.is_number(high))
        for low, high, count in bins
    )
    return list(itertools.dropwhile(lambda one: not one[2], bins)) if sound else []


def series(metrics: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it is a finite number; float64 arrays of equal length."""
    points = [(line["step"], line[key]) for line in metrics if drawing.is_number(line.get(key))]
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smoothing_window(points: int) -> int:
    """Steps of the moving average: about a twentieth of the run, at least five, odd so that it is centred."""
    return max(5, points // 20) | 1


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average, which does not lag behind a falling loss; the window shrinks towards both ends."""
    half, count = window // 2, len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    reach = np.minimum(half, np.minimum(index, count - 1 - index))
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
