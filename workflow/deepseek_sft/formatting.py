"""Figures as text: the unit follows from the key, so a stage's new figure appears without code here.

Units by key: ``…_s``, ``seconds`` durations · ``bytes…``, ``…_bytes``, ``…_gib``, ``…_mib`` sizes (powers of 1024) ·
``…_rate``, ``…_share`` shares of 1 (except ``learning_rate``) · ``parameters`` SI ·
everything else a plain number with thousands separators.
"""

import json
import math
import re
from typing import Any

UNKNOWN = "–"
URL_CREDENTIALS = re.compile(r"//[^/@\s]+:[^/@\s]+@")
SECRET = re.compile(
    r"(api[_-]?key|password|passwd|secret|credential|(^|[_-])token$|[_-]key$|access[_-]?token|auth[_-]?token)",
    re.IGNORECASE,
)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BYTES = {"_kib": 1 << 10, "_mib": 1 << 20, "_gib": 1 << 30, "_tib": 1 << 40}
_LABELS = (  # the value shows the unit, so the label names the quantity
    (re.compile(r"[kmgt]ib_per_second$"), "speed"),
    (re.compile(r"_(s|kib|mib|gib|tib)$"), ""),
    (re.compile(r"^seconds$"), "duration"),
    (re.compile(r"(^|_)bytes$"), r"\1size"),
)


def label(key: str) -> str:
    """A key as words, without the unit that the value shows."""
    for pattern, words in _LABELS:
        key = pattern.sub(words, key)
    return clean(key.replace("_", " "))


def value(key: str, item: Any) -> str:
    """One figure or setting as text."""
    if item is None:
        return UNKNOWN
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, (int, float)):
        return number(key, item)
    if isinstance(item, str):
        return f"{item[:23]}…" if key.endswith("fingerprint") and len(item) > 24 else clean(item)
    if isinstance(item, list) and all(isinstance(entry, (str, int, float, type(None))) for entry in item):
        return ", ".join(value(key, entry) for entry in item) or "none"
    return clean(json.dumps(item, ensure_ascii=False))


def number(key: str, item: float) -> str:
    """A number with the unit its key names."""
    if not math.isfinite(item):
        return str(item)
    for suffix, size in _BYTES.items():
        if key.endswith(suffix):
            return byte_size(item * size)
        if key.endswith(f"{suffix[1:]}_per_second"):
            return f"{byte_size(item * size)}/s"
    if key == "bytes" or key.endswith("_bytes") or key.startswith("bytes_"):
        return byte_size(item)
    if key == "seconds" or key.endswith(("_s", "_seconds")):
        return duration(item)
    if key.endswith(("_rate", "_share")) and key != "learning_rate" and not key.endswith("_learning_rate"):
        return f"{plain(100 * item)} %"
    if key == "parameters" or key.endswith("_parameters"):
        return si(item)
    return plain(item)


def plain(item: float) -> str:
    """Thousands separators for integers, four significant digits for the rest."""
    if isinstance(item, int) or (float(item).is_integer() and abs(item) < 1e15):
        return f"{int(item):,}"
    return f"{item:,.0f}" if abs(item) >= 10_000 else f"{item:,.4g}"


def si(item: float) -> str:
    """``671.0 B``: counts of parameters in thousands, millions, billions (B), trillions."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(item) >= size:
            return f"{item / size:,.1f} {unit}"
    return plain(item)


def byte_size(item: float) -> str:
    """Bytes in the largest binary unit that keeps at least one before the point."""
    for size, unit in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(item) >= size:
            return f"{item / size:,.2f} {unit}"
    return f"{plain(item)} B"


def duration(seconds: float) -> str:
    """Seconds in the two largest units."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def clean(text: str, limit: int | None = None) -> str:
    """Text without terminal sequences and control characters, cut after ``limit`` characters; says how much is cut."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    # A lone surrogate (legal in JSON's \u escapes) cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8")
    if limit is not None and len(text) > limit:
        return f"{text[:limit]}… ({len(text) - limit:,} more characters)"
    return text


def without_secrets(settings: Any, key: str = "") -> Any:
    """Settings with the values of keys that name a secret replaced: reports get passed around."""
    if SECRET.search(key) and settings not in (None, "", {}, []):
        return "(hidden)"
    if isinstance(settings, dict):
        return {name: without_secrets(entry, str(name)) for name, entry in settings.items()}
    if isinstance(settings, list):
        return [without_secrets(entry) for entry in settings]
    if isinstance(settings, str):
        return URL_CREDENTIALS.sub("//(hidden)@", settings)
    return settings


def command_without_secrets(argv: list[str]) -> list[str]:
    """A command line with the values of secret options replaced (``--api-key X``, ``--api-key=X``)."""
    shown, hide_next = [], False
    for word in argv:
        if hide_next:
            shown.append("(hidden)")
            hide_next = False
        elif word.startswith("-") and SECRET.search(word.split("=", 1)[0]):
            shown.append(f"{word.split('=', 1)[0]}=(hidden)" if "=" in word else word)
            hide_next = "=" not in word
        else:
            shown.append(word)
    return shown


def flatten(settings: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text), in their order."""
    if not isinstance(settings, dict):
        return [(prefix, value(prefix.rsplit(".", 1)[-1], settings))]
    rows = []
    for key, item in settings.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        rows += flatten(item, path) if isinstance(item, dict) and item else [(path, value(str(key), item))]
    return rows
