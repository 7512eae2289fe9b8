"""For each allocation of a JSON list on standard input: the profile keys by which the check at start refuses it."""

import json
import sys
import time

from deepseek_sft.errors import BadInputError
from deepseek_sft.site import checks
from deepseek_sft.slurm import Allocation


def refused(values: dict) -> list[str]:
    try:
        checks.check({"train": Allocation(**values)}, lambda rule, key: f"<{key}>", at_once=len)
    except BadInputError as error:
        return sorted({line.split("<")[1].split(">")[0] for line in error.problem.splitlines() if "  - <" in line})
    return []


begin = time.monotonic()
answers = [refused(values) for values in json.load(sys.stdin)]
json.dump({"refused": answers, "seconds": (time.monotonic() - begin) / len(answers)}, sys.stdout)
