"""Plots of conversion and of the served model: throughput, speed by concurrency, losses before and after tuning."""

from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator

from .. import formatting
from . import drawing
from .chat_section import Answered
from .collect import mapping
from .drawing import FIRST, GRID, INK, SECOND, Plot


def throughput(figures: dict[str, Any]) -> Plot | None:
    """Bytes per second that a conversion read and wrote, from its receipt's figures; None where they are unknown."""
    seconds = figures.get("seconds")
    if not drawing.is_number(seconds) or seconds <= 0:
        return None
    rows = [(name, figures.get(key)) for name, key in (("read", "bytes_read"), ("written", "bytes_written"))]
    speeds = [(name, size / seconds) for name, size in rows if drawing.is_number(size) and size > 0]
    if not speeds:
        return None
    figure, (axes,) = drawing.figure(height=0.7 + 0.3 * len(speeds))
    names, values = [name for name, _ in speeds], [value for _, value in speeds]
    axes.barh(names, values, height=0.65, color=FIRST)
    for row, value in enumerate(values):
        drawing.text(axes, value, row, f"{formatting.byte_size(value)}/s", (5, 0), va="center")
    axes.set_xlim(0, 1.35 * max(values))
    axes.invert_yaxis()
    axes.grid(False)
    drawing.bytes_axis(axes.xaxis, max(values), "/s")
    told = ", ".join(f"{name} {formatting.byte_size(value)}/s" for name, value in speeds)
    caption = f"Throughput over {formatting.duration(seconds)}"
    return Plot("throughput", caption, drawing.svg(figure, "throughput", f"{caption}: {told}"))


def serving(benchmark: Any) -> Plot | None:
    """Time to first token and tokens per second by requests at a time, from the smoke test's figure ``benchmark``."""
    rows = mapping(mapping(benchmark).get("by_concurrency"))
    points = sorted(
        (int(concurrency), row)
        for concurrency, row in ((key, mapping(row)) for key, row in rows.items() if str(key).isdecimal())
        if all(drawing.is_number(row.get(key)) for key in ("tokens_per_second", "time_to_first_token_s"))
    )
    if not points:
        return None
    concurrency = np.array([at for at, _ in points], dtype=np.float64)
    figure, axes = drawing.figure((1, 1), 3.6)
    marks = {"marker": "o", "markersize": 4}
    for key, colour, label, style in (
        ("time_to_first_token_s", FIRST, "median", "-"),
        ("time_to_first_token_p99_s", SECOND, "99th percentile", "--"),
    ):
        values = np.array([row[key] if drawing.is_number(row.get(key)) else np.nan for _, row in points])
        if not np.isnan(values).all():
            axes[0].plot(concurrency, values, color=colour, label=label, linestyle=style, **marks)
    axes[1].plot(concurrency, [row["tokens_per_second"] for _, row in points], color=FIRST, **marks)
    drawing.legend(axes[0], loc="upper left")
    titles = ("time to first token", "tokens of answers per second, all requests")
    for one, title, text in zip(axes, titles, (_seconds, drawing.compact), strict=True):
        one.set_title(title, fontsize=9, loc="left", color=INK)
        drawing.y_axis(one, text, from_zero=True, ticks=4)
    axes[0].set_ylim(top=1.35 * axes[0].get_ylim()[1])  # room for the legend
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(concurrency, [f"{at:,}" for at, _ in points])
    axes[1].xaxis.set_minor_locator(NullLocator())
    axes[1].set_xlabel("requests at a time")
    first, last = points[0], points[-1]
    sizes = mapping(benchmark)
    caption = f"Served model by concurrency; {sizes.get('input_tokens')} tokens in, {sizes.get('output_tokens')} out"
    text = f"{caption}: {first[1]['tokens_per_second']:g} tokens per second at {first[0]}, "
    text += f"{last[1]['tokens_per_second']:g} at {last[0]} requests at a time"
    return Plot("serving", formatting.clean(caption), drawing.svg(figure, "serving", text))


def before_and_after(samples: list[Answered]) -> Plot | None:
    """Loss of each held-out reference before and after tuning; None unless both are known of some sample."""
    pairs = np.array([(s.base_loss, s.loss) for s in samples if s.base_loss is not None and s.loss is not None])
    if not len(pairs):
        return None
    figure, (axes,) = drawing.figure(height=2.9)
    high = 1.08 * max(float(pairs.max()), 1e-6)
    axes.plot([0, high], [0, high], color=GRID, linewidth=1)
    axes.scatter(pairs[:, 0], pairs[:, 1], s=22, color=FIRST, alpha=0.75, linewidths=0)
    drawing.text(axes, high, high, "unchanged", (-14, 0), ha="right", va="top")
    axes.set_xlim(0, high)
    axes.set_ylim(0, high)
    axes.set_xlabel("loss of the base")
    axes.set_ylabel("after tuning")
    better = int((pairs[:, 1] < pairs[:, 0]).sum())
    caption = f"Loss of each held-out reference before and after tuning: lower for {better} of {len(pairs)}"
    return Plot("before-after", caption, drawing.svg(figure, "before-after", caption))


def _seconds(value: float) -> str:
    return "0" if value == 0 else formatting.duration(value)
