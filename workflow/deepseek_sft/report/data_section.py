"""What prepare_data made of its sources and of the fields of their records, as tables."""

from typing import Any

from .. import formatting
from .collect import mapping

Grid = tuple[str, list[str], list[list[str]]]
SHOWN = ("sources", "unused_fields", "unclear_fields", "contamination", "held_out")  # figures that have tables here
MOST_ROWS = 50  # sources or fields shown


def grids(figures: dict[str, Any]) -> list[Grid]:
    """Tables (title, head, rows) of sources and of fields that nothing used; none where there is nothing to show."""
    return [
        grid
        for grid in (_sources(figures.get("sources")), _fields(figures), *_contamination(figures), _held_out(figures))
        if grid
    ]


def _sources(found: Any) -> Grid | None:
    sources = {str(place): mapping(source) for place, source in mapping(found).items()}
    if not sources:
        return None
    # those that gave nothing come first, then those that lost most
    ordered = sorted(sources.items(), key=lambda one: (bool(_count(one[1], "accepted")), _share(one[1])))
    rows = [
        [
            formatting.clean(place),
            f"{_count(source, 'accepted'):,} of {_count(source, 'records'):,}",
            ", ".join(f"{formatting.clean(name)} {number}" for name, number in mapping(source.get("formats")).items()),
            ", ".join(f"{formatting.clean(name)} {number}" for name, number in mapping(source.get("rejects")).items()),
        ]
        for place, source in ordered[:MOST_ROWS]
    ]
    return _title("sources", len(sources)), ["", "accepted", "read as", "rejected"], rows


def _fields(figures: dict[str, Any]) -> Grid | None:
    fields = {str(path): mapping(one) for path, one in mapping(figures.get("unused_fields")).items()}
    if not fields:
        return None
    of = figures.get("accepted")
    rows = [
        [formatting.clean(path), f"{_count(one, 'records'):,} of {of:,}" if isinstance(of, int) else "",
         formatting.clean(str(one.get("first", "")))]
        for path, one in list(fields.items())[:MOST_ROWS]
    ]  # fmt: skip
    return _title("fields not used", len(fields)), ["", "records", "first in"], rows


def _contamination(figures: dict[str, Any]) -> list[Grid]:
    """Evaluation sets that were looked for, and the first records that hold an item."""
    found = mapping(figures.get("contamination"))
    sets = [mapping(one) for one in found.get("sets") or []]
    if not sets:
        return []
    done = "left out" if found.get("policy") == "reject" else "kept"
    rows = [
        [formatting.clean(str(one.get("path", ""))), f"{_count(one, 'items_found'):,} of {_count(one, 'items'):,}",
         f"{_count(one, 'records'):,} {done}",
         f"{_count(one, 'texts_not_compared') + _count(one, 'items_without_text'):,}"]
        for one in sets[:MOST_ROWS]
    ]  # fmt: skip
    grids = [(_title("evaluation sets", len(sets)), ["", "items found", "records", "texts not compared"], rows)]
    examples = [
        [formatting.clean(str(one.get("record", ""))), formatting.clean(str(one.get("item", ""))),
         f"{_count(one, 'words_found')} of {_count(one, 'words')}", formatting.clean(str(one.get("text", "")), 200)]
        for one in map(mapping, found.get("examples") or [])
    ]  # fmt: skip
    return grids + ([("records that hold an item", ["", "item", "words", "it begins"], examples)] if examples else [])


def _held_out(figures: dict[str, Any]) -> Grid | None:
    held = mapping(figures.get("held_out"))
    if not held:
        return None
    rows = [
        ["records held out", f"{_count(held, 'records'):,} of {_count(figures, 'accepted'):,}"],
        ["of them the smoke test's prompts", f"{_count(held, 'prompts'):,}"],
        ["records too much alike to part", f"{_count(held, 'records_too_much_alike'):,}"],
    ]
    return "held out of training", ["", ""], rows


def _title(name: str, count: int) -> str:
    return f"{name} ({MOST_ROWS} of {count:,})" if count > MOST_ROWS else name


def _count(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    return value if isinstance(value, int) else 0


def _share(source: dict[str, Any]) -> float:
    return _count(source, "accepted") / max(1, _count(source, "records"))
