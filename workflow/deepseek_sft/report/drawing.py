"""What all plots share: inline SVG with the page's colours and font, so that one drawing serves light, dark and print.

matplotlib draws in placeholder colours; each is replaced by a CSS variable (series colours: Okabe and Ito's palette,
safe for the colour-blind) or ``currentColor``. Heat maps are embedded images, whose colours are the same on any page.
"""

import dataclasses
import html
import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from .. import formatting

INK, PAGE, GRID = "#0a0b0b", "#0a0b0c", "#0a0b0d"
SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 8))  # blue, vermilion, green, pink, sky, orange, grey
FIRST, SECOND = SERIES[:2]
STACKED = tuple(SERIES[number] for number in (0, 5, 2, 3, 4, 1, 6))  # neighbours differ in lightness too
COLOURS = {
    INK: "currentColor",
    PAGE: "var(--page)",
    GRID: "var(--grid)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
MOST_POINTS = 800  # of a drawn line; a long run stays a small file
UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))
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
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawing with its caption; ``svg`` is markup made here only from numbers and fixed words."""

    name: str
    caption: str
    svg: str


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most about ``most`` points that keep every spike: the lowest and highest of each block, and both ends."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for block in np.array_split(np.arange(len(x)), most // 2):
        kept |= {int(block[y[block].argmin()]), int(block[y[block].argmax()])}
    index = sorted(kept)
    return x[index], y[index]


def is_number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)


def figure(ratios: tuple[float, ...] = (1,), height: float = 2.4, share_x: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of stacked axes, ``ratios`` of ``height`` inches each; its width suits a phone."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(5.2, height), layout="constrained")
        drawn.patch.set_alpha(0)
        axes = drawn.subplots(len(ratios), 1, sharex=share_x, squeeze=False, height_ratios=ratios)[:, 0]
        for one in axes:
            one.patch.set_alpha(0)
            one.set_axisbelow(True)
    return drawn, list(axes)


def legend(axes: Axes, **options: Any) -> None:
    """A legend without frame, as small as a caption."""
    axes.legend(**{"frameon": False, "fontsize": 8.5, "borderaxespad": 0.2, "labelcolor": INK} | options)


def text(axes: Axes, x: float, y: float, words: str, offset: tuple[float, float] = (0, 0), **options: Any) -> None:
    """Words in the page's colour, the size of a caption, ``offset`` points from a place in the data."""
    look = {"fontsize": 8.5, "color": INK} | options
    axes.annotate(words, (x, y), xytext=offset, textcoords="offset points", **look)


def line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, **options: Any) -> None:
    axes.plot(*thin(x, y), **({"color": colour, "marker": "o" if len(x) == 1 else None} | options))


def steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def y_axis(axes: Axes, text: Callable[[float], str], from_zero: bool = False, ticks: int = 5) -> None:
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def bytes_axis(axis: Axis, largest: float, suffix: str = "") -> None:
    """Ticks at round multiples of the binary unit that suits the largest value."""
    unit, name = next((size, name) for size, name in UNITS if largest >= size or size == 1)
    ticks = MaxNLocator(nbins=4 if suffix else 5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, largest / unit)
    axis.set_major_locator(FixedLocator([tick * unit for tick in ticks if tick * unit <= 1.01 * largest]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else f"{value / unit:g} {name}{suffix}"))


def compact(value: float) -> str:
    return formatting.si(value).replace(".0 ", " ") if abs(value) >= 10_000 else formatting.plain(value)


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element: no prolog, no metadata, ids of its own, colours from the page."""
    stream = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(stream)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| xmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.DOTALL
    )
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    for placeholder, colour in COLOURS.items():
        text = text.replace(placeholder, colour)
    head = f'role="img" data-plot="{name}" aria-label="{html.escape(description)}"'
    view = re.search(r'viewBox="[^"]*"', text)[0]
    return f"<svg {view} {head}>{text[text.index('>') + 1 :]}".strip()
