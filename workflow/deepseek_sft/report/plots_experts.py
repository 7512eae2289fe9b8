"""Heat maps of how the routers spread tokens over experts, one row for each layer."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import drawing
from .drawing import INK, STYLE, Plot

FACTOR = 8.0  # the colours end at a load this many times above and below an even one
# Blue to vermilion through grey, which the colour-blind tell apart and which neither page swallows; black: no token.
LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#004c7a", "#4a9ccb", "#d5d9dd", "#e8915a", "#8f3a00"]
).with_extremes(bad="#000000")
MOST_COLUMNS = 400


def experts(records: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> list[Plot]:
    """The last recorded load of every expert, and the balance of each layer over the run, as far as they are known."""
    first_layer = next((entry["first_layer"] for entry in reversed(records) if _is_count(entry.get("first_layer"))), 0)
    return [plot for plot in (last_load(records), balance(metrics, first_layer)) if plot]


def last_load(records: list[dict[str, Any]]) -> Plot | None:
    """Load of each expert in each layer at the end of the run, from ``expert_load.jsonl``; None without a record."""
    found = [(entry, load) for entry in records if (load := _matrix(entry.get("load"))) is not None]
    if not found:
        return None
    entry, load = found[-1]  # [layers, experts], 1 is even
    first = entry["first_layer"] if _is_count(entry.get("first_layer")) else 0
    with np.errstate(divide="ignore"):
        shown = np.ma.masked_invalid(np.log2(load))
    reach = np.log2(FACTOR)
    figure, axes = _figure(len(load))
    extent = (-0.5, load.shape[1] - 0.5, first + len(load) - 0.5, first - 0.5)
    _image(axes[0], shown, extent, LOAD_COLOURS, -reach, reach)
    axes[0].set_xlabel("expert")
    axes[0].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _scale(axes[1], LOAD_COLOURS, -reach, reach, lambda value: f"{2**value:g} ×", "load over an even load")
    dead = int((load == 0).sum())
    steps = f"steps {entry.get('from_step')} to {entry.get('step')}"
    without = f"black: {dead:,} without a token" if dead else "none without a token"
    caption = f"Load of each expert by layer, {steps}; {without}"
    text = f"Expert load of {len(load)} layers and {load.shape[1]} experts, busiest {load.max():.3g} times an even load"
    return Plot("expert-load", caption, drawing.svg(figure, "expert-load", text))


def balance(metrics: list[dict[str, Any]], first_layer: int) -> Plot | None:
    """Entropy of each layer's load over the steps, from the metrics; None where they hold none.

    Args:
        first_layer: number of the first layer with experts.
    """
    lines = [line for line in metrics if isinstance(line.get("expert_load_entropy"), list)]
    lines = (
        [lines[index] for index in np.unique(np.linspace(0, len(lines) - 1, MOST_COLUMNS).astype(int))] if lines else []
    )
    entropy = _matrix([line["expert_load_entropy"] for line in lines])
    if entropy is None or len(lines) < 2:
        return None
    low = min(0.8, float(np.floor(entropy.min() * 10) / 10))
    colours = matplotlib.colormaps["cividis"]
    figure, axes = _figure(entropy.shape[1])
    # Logged steps are evenly spaced but for the first and the last.
    extent = (lines[0]["step"], lines[-1]["step"], first_layer + entropy.shape[1] - 0.5, first_layer - 0.5)
    _image(axes[0], entropy.T, extent, colours, low, 1.0)
    drawing.steps_axis(axes[0])
    _scale(axes[1], colours, low, 1.0, lambda value: f"{value:g}", "entropy of the load: 1 is even, 0 a single expert")
    text = f"Entropy of the expert load of {entropy.shape[1]} layers over {len(lines)} steps, least {entropy.min():.3g}"
    return Plot(
        "expert-balance", "Balance of the experts by layer and step", drawing.svg(figure, "expert-balance", text)
    )


def _figure(layers: int) -> tuple[Figure, list[Axes]]:
    """A map with its scale below it; more layers make it higher."""
    height = 1.3 + min(3.0, max(0.7, 0.06 * layers))
    figure, axes = drawing.figure((height - 1.1, 0.12), height, share_x=False)
    axes[0].set_ylabel("layer")
    axes[0].yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for one in axes:
        one.grid(False)
    return figure, axes


def _image(axes: Axes, values: Any, extent: tuple[float, ...], colours: Colormap, low: float, high: float) -> None:
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none", extent=extent)


def _scale(axes: Axes, colours: Colormap, low: float, high: float, text: Any, label: str) -> None:
    """A bar of all colours with their values."""
    _image(axes, np.linspace(low, high, 128)[None, :], (low, high, 0, 1), colours, low, high)
    axes.set_yticks([])
    axes.set_xticks(np.linspace(low, high, 7 if low < 0 else 5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    with matplotlib.rc_context(STYLE):
        axes.set_xlabel(label, color=INK)


def _matrix(rows: Any) -> np.ndarray | None:
    """Rows of equal length of non-negative numbers as float64; None for anything else."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        return None
    if len({len(row) for row in rows}) > 1 or not all(
        drawing.is_number(item) and item >= 0 for row in rows for item in row
    ):
        return None
    return np.array(rows, dtype=np.float64)


def _is_count(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)
