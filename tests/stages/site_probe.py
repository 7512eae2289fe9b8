"""For each allocation of a JSON list on standard input: the profile keys by which the check at start refuses it."""

import json
import sys

from deepseek_sft.errors import BadInputError
from deepseek_sft.site import questions, start_check
from deepseek_sft.site.answers import Site
from deepseek_sft.slurm.sbatch import Allocation


def refused(values: dict, site: Site) -> list[str]:
    try:
        start_check.judge({"train": Allocation(**values).wanted()}, site, lambda rule, key: f"<{key}>", at_once=len)
    except BadInputError as error:
        return sorted({line.split("<")[1].split(">")[0] for line in error.problem.splitlines() if "  - <" in line})
    return []


found, silent = questions.site()
assert not silent, silent
json.dump([refused(values, found) for values in json.load(sys.stdin)], sys.stdout)
