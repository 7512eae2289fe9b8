"""Sizes as people write them: ``5GB``, ``512MiB``."""

import re

from ..errors import BadInputError

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}".lower(): base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of ``5GB`` (powers of 1000), ``5GiB`` (powers of 1024) or a plain number; upper and lower case alike.

    Raises:
        BadInputError: anything else, or zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if unit is None or float(match[1]) * unit < 1:
        raise BadInputError(f"{text!r} is not a size", "write it like 5GB, 512MiB or 1000000")
    return int(float(match[1]) * unit)
