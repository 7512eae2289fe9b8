"""The one place that touches Snakemake's rule objects (Snakemake is pinned): resources after profile and command line.

The Slurm plugin runs a multi-node body in the batch step, on the first node, with a nested srun that sees the whole
allocation, in exactly one combination: ``mpi: ""``, ``tasks`` = ``nodes``, ``tasks_per_gpu: 0``. Without ``mpi`` the
body runs inside a one-task step and srun fails or hangs; without ``tasks_per_gpu`` the number of tasks is wrong.
"""

from typing import Any

from snakemake.iocontainers import InputFiles, Wildcards

from .errors import BadInputError
from .slurm import Allocation, check_memory, check_nodes, option

# Slurm resource → field of Allocation
FIELDS = {
    "nodes": "nodes",
    "cpus_per_task": "cpus_per_task",
    "mem_mb": "mem_mb",
    "runtime": "runtime",
    "slurm_partition": "partition",
    "gres": "gres",
    "slurm_extra": "extra",
    "slurm_account": "account",
}


# These rules run on the nodes of another one: what the profile gives to that one holds for both.
SAME_NODES = {"preflight": "train"}
OWN_TIME = {"preflight": 60}  # minutes


def _attempt(wildcards: Any, attempt: int) -> int:
    return attempt


def complete_resources(workflow: Any) -> dict[str, set[str]]:
    """Give every rule the resources that it may format into its shell command, and the plugin's combination.

    Returns:
        Rule name → the resources that rule, profile or command line state; all others are filled in here.
    """
    _share_nodes(workflow)
    stated = {rule.name: set(FIELDS) & set(rule.resources) for rule in workflow.rules}
    for rule in workflow.rules:
        for name, field in FIELDS.items():
            if name not in rule.resources:
                rule.resources[name] = getattr(Allocation(), field)
        rule.resources["tasks"] = value(rule, "nodes")
        rule.resources["tasks_per_gpu"] = 0
        rule.resources["mpi"] = ""
        rule.resources["attempt"] = _attempt
    return stated


def _share_nodes(workflow: Any) -> None:
    """Give rules of ``SAME_NODES`` the other rule's resources, but for what the profile states for them by name."""
    rules = {rule.name: rule for rule in workflow.rules}
    for name, of in SAME_NODES.items():
        own = workflow.resource_settings.overwrite_resources.get(name, {})
        for resource in FIELDS:
            if resource not in own and resource in rules[of].resources:
                rules[name].resources[resource] = rules[of].resources[resource]
        if "runtime" not in own:
            rules[name].resources["runtime"] = OWN_TIME[name]
        if "slurm_extra" not in own and "slurm_extra" in rules[name].resources:
            # Not the signal by which Slurm asks training to save: it could come at once in so short a job.
            words = [word for word in value(rules[name], "slurm_extra").split() if not word.startswith("--signal")]
            rules[name].resources["slurm_extra"] = " ".join(words)


def value(rule: Any, name: str) -> Any:
    """A rule's resource on its first attempt; profile and command line give text that Snakemake evaluates as Python."""
    context = {"attempt": 1, "threads": 1, "rulename": rule.name, "async_run": rule.workflow.async_run}
    return rule.resources[name].evaluate(Wildcards(), input=InputFiles(), **context).value


def allocation(rule: Any) -> Allocation:
    """The allocation a rule asks for on its first attempt."""
    return Allocation(**{field: value(rule, name) for name, field in FIELDS.items()})


def deployment(workflow: Any) -> Allocation:
    """The allocation of a lasting deployment: the smoke test's, and what the profile sets for ``serve`` otherwise."""
    test, serve = workflow.get_rule("smoke_test"), workflow.get_rule("serve")
    own = workflow.resource_settings.overwrite_resources.get("serve", {})
    return Allocation(**{field: value(serve if name in own else test, name) for name, field in FIELDS.items()})


def own_allocation() -> str:
    """Arguments of render_sbatch.py, as shell text in which Snakemake fills in the resources of the job it runs in."""
    return " ".join(f"{option(field)}={{resources.{name}:q}}" for name, field in FIELDS.items())


def allocations(workflow: Any) -> dict[str, Allocation]:
    """Rule name → allocation, for the rules that run as jobs or submit one."""
    jobs = {rule.name: allocation(rule) for rule in workflow.rules if not workflow.is_local(rule)}
    return jobs | {"serve": deployment(workflow)}


def rules_to_run(workflow: Any) -> set[str]:
    """Names of the rules that have a job to run now; known once the workflow starts."""
    return {job.rule.name for job in workflow.dag.needrun_jobs()}


def check_allocations(workflow: Any, rules: set[str]) -> None:
    """Raises BadInputError when a rule of ``rules`` asks for what its partition has not: nodes, memory (``sinfo``)."""
    wanted = allocations(workflow)
    asked = sorted(rules & set(wanted))
    problems = [check(name, wanted[name]) for name in asked for check in (check_nodes, check_memory)]
    if problems := [problem for problem in problems if problem]:
        raise BadInputError("\n".join(problems))
