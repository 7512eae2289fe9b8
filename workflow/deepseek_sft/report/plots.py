"""Plots as inline SVG that takes its colours and font from the page, so that one drawing serves light, dark and print.

matplotlib draws in placeholder colours; each is replaced by a CSS variable (series colours: Okabe and Ito's palette,
safe for the colour-blind) or ``currentColor``.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import formatting

INK, PAGE, GRID, FIRST, SECOND = "#0a0b0b", "#0a0b0c", "#0a0b0d", "#0a0b0e", "#0a0b0f"
COLOURS = {
    INK: "currentColor",
    PAGE: "var(--page)",
    GRID: "var(--grid)",
    FIRST: "var(--series-1)",
    SECOND: "var(--series-2)",
}
MOST_POINTS = 800  # of a drawn line; a long run stays a small file
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's font
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "lines.linewidth": 1.8,
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing with its caption; ``svg`` is markup made here only from numbers and fixed words."""

    name: str
    caption: str
    svg: str


def training(metrics: list[dict[str, Any]]) -> list[Plot]:
    """Loss with learning rate, gradient norm, speed and memory over steps, as far as the metrics hold them."""
    plots = []
    steps, loss = series(metrics, "loss")
    if len(steps):
        plots.append(_loss(steps, loss, *series(metrics, "learning_rate")))
    for key, name, caption in (
        ("grad_norm", "grad-norm", "Gradient norm before clipping"),
        ("tokens_per_second", "speed", "Tokens per second, all ranks"),
        ("memory_gib", "memory", "Memory of rank 0 in GiB"),
    ):
        steps, values = series(metrics, key)
        if len(steps):
            figure, axes = _figure()
            _line(axes, steps, values, FIRST)
            _steps_axis(axes)
            _y_axis(axes, _compact, from_zero=key != "grad_norm" and values.min() >= 0)
            plots.append(Plot(name, caption, _svg(figure, name, f"{caption} over {len(steps)} steps")))
    return plots


def _loss(steps: np.ndarray, loss: np.ndarray, rate_steps: np.ndarray, rate: np.ndarray) -> Plot:
    figure, axes = _figure(panels=2 if len(rate) else 1)
    axes = np.atleast_1d(axes)
    caption = "Loss per step"
    if len(steps) >= 20:
        _line(axes[0], steps, loss, FIRST, linewidth=1.0, alpha=0.4)
        window = smoothing_window(len(steps))
        _line(axes[0], steps, smooth(loss, window), FIRST)
        caption = f"Loss per step (thin) and its moving average over {window} points"
    else:
        _line(axes[0], steps, loss, FIRST)
    _y_axis(axes[0], _compact)
    if len(rate):
        caption += "; below: learning rate"
        axes[0].tick_params(bottom=False)
        _line(axes[1], rate_steps, rate, SECOND)
        _y_axis(axes[1], lambda value: "0" if value == 0 else f"{value:.2g}", from_zero=True, ticks=2)
    _steps_axis(axes[-1])
    text = f"Loss over {len(steps)} steps, from {loss[0]:.4g} to {loss[-1]:.4g}"
    return Plot("loss", caption, _svg(figure, "loss", text))


def lengths(statistics: Any) -> Plot | None:
    """Histogram of sample lengths from statistics.json, with what the cut rejected; None where it holds none."""
    bins = histogram(statistics)
    if not bins:
        return None
    figure, axes = _figure()
    counts = [count for _, _, count in bins]
    rejected = [_too_long(statistics, low) for low, _, _ in bins]
    # Bins double in width, so equal bars are a logarithmic axis that can begin at 0.
    style = {"width": 1, "align": "edge", "edgecolor": PAGE, "linewidth": 0.6}
    axes.bar(range(len(bins)), counts, color=FIRST, **style)
    cut = statistics.get("max_length")
    if _is_number(cut) and any(low < cut and (high is None or cut <= high) for low, high, _ in bins):
        axes.axvline(_position(bins, cut), color=INK, linewidth=1, linestyle="--")
    edges = [_compact(low) for low, _, _ in bins] + ["more" if bins[-1][1] is None else _compact(bins[-1][1])]
    every = 1 + len(bins) // 10
    axes.set_xticks(range(0, len(edges), every), edges[::every])
    axes.set_xlabel("tokens in a sample")
    _y_axis(axes, _compact, from_zero=True)
    caption = "Samples by length"
    if any(rejected):
        axes.bar(range(len(bins)), rejected, bottom=counts, color=SECOND, **style)
        caption += f" (second colour: {sum(rejected):,} rejected as longer than {cut:,} tokens, the dashed line)"
    return Plot("lengths", caption, _svg(figure, "lengths", f"{caption}: {sum(counts):,} samples"))


def reasoning_by_answer(statistics: Any) -> Plot | None:
    """Trained turns by tokens of reasoning and of answer, as circles whose area is their number; None without any."""
    entries = statistics.get("reasoning_by_answer") if isinstance(statistics, dict) else None
    try:
        cells = [(entry["reasoning"]["from"], entry["answer"]["from"], entry["turns"]) for entry in entries or []]
    except (KeyError, TypeError):
        return None
    if not cells or not all(_is_number(number) and number >= 0 for cell in cells for number in cell):
        return None
    # The middle of a bin that doubles in width, in powers of two; bin 0 reaches to 16.
    reasoning, answers = (np.log2([max(cell[axis], 8) * 1.5 for cell in cells]) for axis in (0, 1))
    turns = np.array([cell[2] for cell in cells], dtype=np.float64)
    figure, axes = _figure()
    axes.scatter(reasoning, answers, s=250 * turns / max(turns.max(), 1), color=FIRST, alpha=0.7, linewidths=0)
    for axis, name in ((axes.xaxis, "tokens of reasoning"), (axes.yaxis, "tokens of answer")):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _compact(2**value)))
        axis.set_label_text(name)
    axes.margins(0.15)
    caption = "Trained turns by length of reasoning and answer"
    return Plot("reasoning", caption, _svg(figure, "reasoning", f"{caption}: {int(turns.sum()):,} turns"))


def _too_long(statistics: Any, low: int) -> int:
    """Samples of one bin of the histogram that were rejected as too long."""
    entry = next(entry for entry in statistics["length_histogram"] if entry.get("from") == low)
    return entry["too_long"] if _is_number(entry.get("too_long")) else 0


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
        _is_number(low) and _is_number(count) and (high is None or _is_number(high)) for low, high, count in bins
    )
    return list(itertools.dropwhile(lambda one: not one[2], bins)) if sound else []


def series(metrics: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it is a finite number; float64 arrays of equal length."""
    points = [(line["step"], line[key]) for line in metrics if _is_number(line.get(key))]
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


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``most`` points that keep every spike: the lowest and highest of each block, and both ends."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for block in np.array_split(np.arange(len(x)), most // 2):
        kept |= {int(block[y[block].argmin()]), int(block[y[block].argmax()])}
    index = sorted(kept)
    return x[index], y[index]


def _is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)


def _figure(panels: int = 1) -> tuple[Figure, Any]:
    """A figure with one axes, or with a list of stacked ones that share x; sizes suit a phone's width."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.3 if panels == 2 else 2.4), layout="constrained")
        figure.patch.set_alpha(0)
        ratios = [2.4, 1][:panels]
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
        for one in axes:
            one.patch.set_alpha(0)
            one.set_axisbelow(True)
    return figure, axes if panels == 2 else axes[0]


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **options: Any) -> None:
    axes.plot(*thin(x, y), color=colour, marker="o" if len(x) == 1 else None, **options)


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _y_axis(axes: Axes, text: Callable[[float], str], from_zero: bool = False, ticks: int = 5) -> None:
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def _compact(value: float) -> str:
    return formatting.si(value).replace(".0 ", " ") if abs(value) >= 10_000 else formatting.plain(value)


def _svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element: no prolog, no metadata, ids of its own, colours from the page."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(stream)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"", "", svg, flags=re.DOTALL
    )
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for placeholder, colour in COLOURS.items():
        svg = svg.replace(placeholder, colour)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \g<1> role="img" aria-label="{description}">', svg, count=1
    )
    return svg.strip()
