"""The one place that touches Snakemake's rule objects (Snakemake is pinned): resources after profile and command line.

The Slurm plugin runs a multi-node body in the batch step, on the first node, with a nested srun that sees the whole
allocation, in exactly one combination: ``mpi: ""``, ``tasks`` = ``nodes``, ``tasks_per_gpu: 0``. Without ``mpi`` the
body runs inside a one-task step and srun fails or hangs; without ``tasks_per_gpu`` the number of tasks is wrong.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any

from snakemake.iocontainers import InputFiles, Wildcards

from . import command_line, submission
from .errors import BadInputError
from .slurm import Allocation, check_nodes, option

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
PREVIEWED = {"preflight", "train", "smoke_test", "serve"}  # stages whose sbatch scripts target `render` shows


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
    jobs = {rule.name: allocation(rule) for rule in workflow.rules if _is_job(workflow, rule)}
    return jobs | {"serve": deployment(workflow)}


def _is_job(workflow: Any, rule: Any) -> bool:
    """Whether a rule is a job of its own, known before Snakemake has chosen what runs jobs (``is_local`` is not)."""
    return rule.name not in workflow._localrules and not rule.norun


def rules_to_run(workflow: Any) -> set[str]:
    """Names of the rules that have a job to run now; known once the workflow starts."""
    return {job.rule.name for job in workflow.dag.needrun_jobs()}


def requested(workflow: Any) -> set[str]:
    """Names of the rules that the targets stand on, to be run now or not; known before Snakemake builds its graph."""
    rules = {rule.name: rule for rule in workflow.rules}
    makers = {str(path): rule.name for rule in workflow.rules for path in rule.output}
    targets = set(workflow.dag_settings.targets) or {workflow.default_target}
    found: set[str] = set()
    open_ends = {name if name in rules else makers.get(str(name).removeprefix("./"), "") for name in targets} - {""}
    while open_ends:
        found |= open_ends
        paths = {str(path) for name in open_ends for path in rules[name].input if not callable(path)}
        open_ends = {makers[path] for path in paths if path in makers} - found
    if any("render" in name for name in found):
        found |= PREVIEWED
    return found


def around_graph(workflow: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call ``before`` once the targets are known and ``after`` once the jobs are, in dry runs too.

    Snakemake has hooks for neither: its ``onstart`` comes later, and never in a dry run. Both may raise WorkflowError.
    """
    execute, build = workflow.execute, workflow._build_dag

    def build_then_check(*arguments: Any, **options: Any) -> None:
        build(*arguments, **options)
        after()

    def check_then_execute(*arguments: Any, **options: Any) -> None:
        before()
        workflow._build_dag = build_then_check
        execute(*arguments, **options)

    workflow.execute = check_then_execute


def force(workflow: Any, names: Collection[str]) -> None:
    """Have rules run again as with --forcerun, where the graph of jobs contains them."""
    workflow.dag_settings.forcerun = frozenset(workflow.dag_settings.forcerun) | set(names)


def is_asked_again(workflow: Any, name: str, forced: Collection[str]) -> bool:
    """Whether the person asked for a rule to run again: by name, with --forceall, or by changing its settings."""
    settings = workflow.dag_settings
    by_name = (name in settings.forcerun and name not in forced) or (settings.forcetargets and name in settings.targets)
    jobs = [job for job in workflow.dag.needrun_jobs() if job.rule.name == name]
    return by_name or settings.forceall or any(workflow.dag.reason(job).params_changed for job in jobs)


def submitted(workflow: Any) -> set[str]:
    """Names of the rules that become Slurm jobs under this profile; `serve` submits one itself."""
    plugin = workflow.executor_plugin.name  # `dryrun` in a dry run
    if (command_line.executor(sys.argv[1:]) if plugin == "dryrun" else plugin) != submission.EXECUTOR:
        return set()
    return {rule.name for rule in workflow.rules if _is_job(workflow, rule)} | {"serve"}


def check_allocations(workflow: Any, rules: set[str]) -> None:
    """Raises BadInputError when one of ``rules`` asks for more nodes than its partition has (asks ``sinfo``)."""
    wanted = allocations(workflow)
    problems = [check_nodes(name, wanted[name]) for name in sorted(rules & (submitted(workflow) | {"serve"}))]
    if problems := [problem for problem in problems if problem]:
        raise BadInputError("\n".join(problems))
