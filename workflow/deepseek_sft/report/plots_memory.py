"""The memory that was planned, part by part, beside what was measured."""

from typing import Any

from matplotlib.axes import Axes

from .. import formatting
from . import drawing
from .calibration import NOT_MEASURED, Comparison
from .collect import mapping
from .drawing import INK, PAGE, STACKED, Plot

PARTS = 6  # of a bar; the smaller ones are drawn together
SHOWN_LIMIT = 1.6  # a limit further off than this many times the bar would leave little room for it
PANELS = (  # figure of the plan, its limit, its name in the comparison, title
    ("rank_memory", "GPU memory per rank", "memory of a rank", "one rank"),
    ("host_memory", "host memory per node", "host memory of a node", "host of one node"),
)


def memory(plan: dict[str, Any], compared: list[Comparison]) -> Plot | None:
    """Stacked bars of the plan's memory with the limit, and beside them what training used where it is known.

    Args:
        plan: figures of the plan's receipt.
    """
    found = [(panel, parts) for panel in PANELS if (parts := _parts(plan.get(panel[0])))]
    if not found:
        return None
    measured = {one.name: one.measured for one in compared if one.name in [panel[2] for panel, _ in found]}
    rows = [2 if panel[2] in measured else 1 for panel, _ in found]
    # inches of each panel's bars, and of its legend below them
    heights = [
        inches
        for count, (_, parts) in zip(rows, found, strict=True)
        for inches in (0.5 + 0.27 * count, 0.06 + 0.17 * len(parts))
    ]
    figure, axes = drawing.figure(tuple(heights), sum(heights) + 0.1, share_x=False)
    told, dashed = [], False
    rank_parts = mapping(plan.get("rank_memory"))
    not_part = "process_bytes" not in rank_parts and any(name in rank_parts for name in NOT_MEASURED)
    for number, ((_, limit_name, name, title), parts) in enumerate(found):
        limit = mapping(mapping(plan.get("limits")).get(limit_name)).get("have_bytes")
        dashed |= _panel(
            axes[2 * number],
            axes[2 * number + 1],
            title,
            parts,
            measured.get(name),
            limit if drawing.is_number(limit) else None,
        )
        total = formatting.byte_size(sum(size for _, size in parts))
        known = f", measured {formatting.byte_size(measured[name])}" if name in measured else ""
        told.append(f"{title}: planned {total}{known}")
    caption = "Memory as planned" + (" and as measured" if measured else "") + ("; dashed: the limit" if dashed else "")
    if not_part and measured:
        caption += "; slack, context and NCCL are not part of what is measured"
    return Plot("memory-plan", caption, drawing.svg(figure, "memory-plan", "; ".join(told)))


def _panel(
    axes: Axes,
    below: Axes,
    title: str,
    parts: list[tuple[str, float]],
    measured: float | None,
    limit: float | None,
) -> bool:
    """Bars in ``axes``, their legend in ``below``; says whether the limit is near enough to be drawn."""
    begin = 0.0
    for colour, (name, size) in zip(STACKED, parts, strict=False):
        label = f"{name}, {formatting.byte_size(size)}"
        axes.barh([0], [size], left=begin, height=0.7, color=colour, edgecolor=PAGE, linewidth=0.6, label=label)
        begin += size
    if measured is not None:
        axes.barh([1], [measured], height=0.7, color="none", edgecolor=INK, linewidth=1.2, hatch="////")
    longest = max(begin, measured or 0)
    near = limit is not None and limit <= SHOWN_LIMIT * longest
    if near:
        axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
        longest = max(longest, limit)
    axes.set_xlim(0, 1.04 * longest)
    axes.set_yticks(
        [0, 1] if measured is not None else [0], ["planned", "measured"][: 2 if measured is not None else 1]
    )
    axes.invert_yaxis()
    axes.grid(False)
    axes.grid(True, axis="x")
    drawing.bytes_axis(axes.xaxis, longest)
    off = f" (limit: {formatting.byte_size(limit)})" if limit is not None else ""
    axes.set_title(title + off, fontsize=10, loc="left", color=INK)
    handles, labels = axes.get_legend_handles_labels()
    below.set_axis_off()
    drawing.legend(below, handles=handles, labels=labels, loc="upper left", labelspacing=0.25)
    return near


def _parts(entries: Any) -> list[tuple[str, float]]:
    """Name and bytes of the largest parts, in the plan's order but what cannot be measured last; the rest as one."""
    sizes = [(str(key), size) for key, size in mapping(entries).items() if drawing.is_number(size) and size > 0]
    large, rest = sizes, 0
    if len(sizes) > PARTS + 1:
        kept = set(sorted(range(len(sizes)), key=lambda index: -sizes[index][1])[:PARTS])
        large = [entry for index, entry in enumerate(sizes) if index in kept]
        rest = sum(size for index, (_, size) in enumerate(sizes) if index not in kept)
    count = len(sizes) - len(large)
    large.sort(key=lambda entry: entry[0] in NOT_MEASURED)
    named = [(name.removesuffix("_bytes").replace("_", " "), float(size)) for name, size in large]
    return named + ([(f"{count} smaller parts", float(rest))] if count else [])
