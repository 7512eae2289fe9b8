"""The check at start: every job to submit against what the site's Slurm says, with the profile's keys in the answer."""

import shutil
from collections.abc import Callable
from typing import Protocol

from ..errors import BadInputError
from . import accounts, partition_limits, questions
from .answers import Site, Wanted


class Allocation(Protocol):
    def wanted(self) -> Wanted: ...


def check(
    allocations: dict[str, Allocation],
    key: Callable[[str, str], str],
    at_once: Callable[[set[str]], int],
    lines: dict[str, str] | None = None,
) -> list[str]:
    """Ask Slurm, and judge.

    Args:
        allocations: rule → what its job will ask for.
        key: where rule and resource are written, for messages.
        at_once: how many jobs of these rules Slurm will hold at a time.
        lines: rule → options of its sbatch line, for what only the site's own plugins of Slurm know.

    Returns:
        Sentences on what may keep jobs waiting, and on what could not be checked.

    Raises:
        BadInputError: at least one job can never start.
    """
    if shutil.which("sbatch") is None:
        raise BadInputError(
            f"{', '.join(allocations)} would be submitted to Slurm, and there is no sbatch here",
            "run this on the cluster's login node, or with a profile without Slurm (profiles/local)",
        )
    try:
        site, warnings = questions.site()
    except questions.SilentError as error:
        return [f"{error.problem}: whether the jobs can start at all is not checked"]
    warnings += judge({rule: one.wanted() for rule, one in allocations.items()}, site, key, at_once)
    return warnings + questions.rehearse(lines or {})


def judge(
    wanted: dict[str, Wanted], site: Site, key: Callable[[str, str], str], at_once: Callable[[set[str]], int]
) -> list[str]:
    """The same with Slurm's answers in hand."""
    refused: dict[str, list[str]] = {}
    warned: dict[str, list[str]] = {}
    held: dict[tuple[str, int], set[str]] = {}
    for rule, one in wanted.items():
        for problem in partition_limits.problems(one, site):
            text = f"{key(rule, problem.resource)}: {problem.text}\n    fix: {problem.fix}"
            refused.setdefault(text, []).append(rule)
        for warning in partition_limits.warnings(one, site):
            warned.setdefault(warning, []).append(rule)
        if most := accounts.most_submitted(one, site):
            held.setdefault(most, set()).add(rule)
    for (holder, most_jobs), rules in held.items():
        if most_jobs < at_once(rules):
            many = f"{most_jobs} job{'s' * (most_jobs != 1)} of yours at a time (MaxSubmitJobs)"
            fix = f"write jobs: {most_jobs}" if most_jobs else "write another slurm_account or qos"
            refused[f"profile, jobs: {holder} takes {many}\n    fix: {fix}"] = sorted(rules)
    if refused:
        lines = [
            f"  - {text.replace(chr(10), f' [{chr(44).join(rules)}]{chr(10)}', 1)}" for text, rules in refused.items()
        ]
        raise BadInputError("this cluster would never start these jobs; nothing was submitted\n" + "\n".join(lines))
    return [f"{', '.join(rules)}: {text}" for text, rules in warned.items()]
