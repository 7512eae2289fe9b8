"""What a source that gave no record may be instead of records, told from its beginning."""

import contextlib
import json
from pathlib import Path

from ..errors import BadInputError
from .sources import first_bytes

LOOKED_AT = 1 << 16  # bytes


def source_hint(path: Path) -> str:
    """What to do about a file without a usable record; empty where its beginning does not tell."""
    if path.suffix == ".parquet":
        return ""
    with contextlib.suppress(BadInputError):  # a damaged file has stopped the stage already, or does so
        begin = first_bytes(path, LOOKED_AT)
        if begin.startswith(b"version https://git-lfs"):
            return "this is a pointer of Git LFS, not the file: fetch it with git lfs pull"
        text = begin.decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
        line = text.partition("\n")[0].strip()
        is_array = path.with_suffix("").suffix == ".json" or path.suffix == ".json"
        if text.startswith("[") and not is_array and not _is_json(line, dict):
            return f"this is a JSON array, not JSON Lines: name it {_as_json(path)}"
        if text.startswith("{") and not _is_json(line, object) and text.startswith(line + "\n"):
            return (
                "this is JSON over several lines: write one record a line, for example with "
                f"jq -c . {path.name} > {path.stem}_lines.jsonl (jq -c '.data[]' where a field holds the records)"
            )
    return ""


def _is_json(line: str, kind: type) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except (ValueError, RecursionError):
        return False


def _as_json(path: Path) -> str:
    name = path.name
    for suffix in (".jsonl", ".ndjson"):
        name = name.replace(suffix, ".json")
    return name
