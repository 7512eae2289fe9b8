"""Slurm's own notations: times, generic resources, lists of host names and nodes, tables. Pure functions over text."""

import re
from collections.abc import Iterator

UNLIMITED = ("", "UNLIMITED", "INFINITE", "NONE", "N/A", "(null)", "(NULL)")
MEMORY_MB = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}


def minutes(text: str) -> int | None:
    """Minutes of ``minutes``, ``minutes:seconds``, ``h:m:s``, ``d-h``, ``d-h:m`` or ``d-h:m:s``; begun ones count.

    None for no time at all: ``UNLIMITED``, ``NONE``, or text of another form.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    first, second, third = (int(part or 0) for part in match.groups()[1:])
    if match[1] is not None:
        seconds = int(match[1]) * 86400 + first * 3600 + second * 60 + third
    elif match[4] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    return -(-seconds // 60)


def duration(count: int) -> str:
    """Minutes as people say them: ``90 minutes``, ``2 days``."""
    for size, name in ((1440, "day"), (60, "hour"), (1, "minute")):
        if count % size == 0 and (count >= 2 * size or count == size):
            return f"{count // size} {name}{'' if count == size else 's'}"
    return f"{count} minutes"


def number(text: str) -> int | None:
    """A count; None where there is no limit."""
    return int(text) if text.strip().isdigit() else None


def memory_mb(text: str) -> int | None:
    """Megabytes of ``64000``, ``64000M``, ``62.5G``; None where there is no limit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)[nc]?", text.strip())
    return int(float(match[1]) * MEMORY_MB[match[2] or "M"]) if match else None


def split(text: str) -> list[str]:
    """Parts between commas outside of brackets and parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def gres(text: str) -> dict[tuple[str, str], int]:
    """(name, type) → count of ``gpu:h100:8(S:0-1),nvme:1``; the type is empty where none is named."""
    found: dict[tuple[str, str], int] = {}
    for item in split("" if text in UNLIMITED else text):
        plain = re.sub(r"\(.*\)$", "", item.removeprefix("gres:").removeprefix("gres/"))
        name, *rest = re.split("[:=]", plain)
        counted = rest.pop() if rest and re.fullmatch(r"\d+[KMGT]?", rest[-1]) else "1"
        key = (name, ":".join(rest))
        found[key] = found.get(key, 0) + (int(counted) if counted.isdigit() else int(counted[:-1]))
    return found


def gres_without_sockets(text: str) -> str:
    """``gpu:h100:8`` of what sinfo and scontrol print, ``gpu:h100:8(S:0-1)``."""
    return re.sub(r"\((?:S|IDX|CNT):[^)]*\)", "", text)


def hosts(text: str) -> list[str]:
    """Names of a host list, such as ``gpu[01-03,7],login``."""
    return [name for part in split("" if text in UNLIMITED else text) for name in _expanded(part)]


def _expanded(part: str) -> Iterator[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if not match:
        yield part
        return
    before, ranges, after = match.groups()
    for one in ranges.split(","):
        low, _, high = one.partition("-")
        if not low.isdigit() or not (high or low).isdigit():
            continue
        for index in range(int(low), int(high or low) + 1):
            for rest in _expanded(after):
                yield f"{before}{index:0{len(low)}d}{rest}"


def records(text: str) -> list[dict[str, str]]:
    """What ``scontrol --oneliner show …`` prints: one mapping a line. Of keys that come twice the first counts."""
    found = []
    for line in text.splitlines():
        record: dict[str, str] = {}
        starts = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z/:_]*)=", line))
        ends = [match.start() for match in starts[1:]] + [len(line)]
        for here, end in zip(starts, ends, strict=False):
            record.setdefault(here[1], line[here.end() : end].strip())
        if record:
            found.append(record)
    return found


def settings(text: str) -> dict[str, str]:
    """What ``scontrol show config`` prints."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def table(text: str) -> list[dict[str, str]]:
    """What ``sacctmgr --parsable2 show …`` prints: rows under a line of names."""
    lines = [line.split("|") for line in text.splitlines() if line]
    return [dict(zip(lines[0], row, strict=False)) for row in lines[1:]]


def tres(text: str) -> dict[str, int]:
    """Trackable resources, such as ``cpu=96,mem=500G,gres/gpu=8``; memory in MB."""
    found = {}
    for item in split(text):
        name, _, value = item.partition("=")
        counted = memory_mb(value) if name == "mem" else number(value)
        if counted is not None:
            found[name] = counted
    return found


def features(constraint: str) -> list[str]:
    """Names in a constraint such as ``[rack1|rack2]&h100*4``."""
    return re.findall(r"[A-Za-z_][\w.:/=+-]*", re.sub(r"\*\d+", "", constraint))


def has_features(available: set[str], constraint: str) -> bool:
    """Whether one node can satisfy the constraint; alternatives and counts count as satisfied by any of their names."""
    if any(letter in constraint for letter in "[(*!"):
        return any(name in available for name in features(constraint))
    return any(all(name in available for name in features(choice)) for choice in constraint.split("|"))
