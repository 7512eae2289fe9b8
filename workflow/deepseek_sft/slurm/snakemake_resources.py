"""The one place that touches Snakemake's rule objects (Snakemake is pinned): resources after profile and command line.

The Slurm plugin runs a multi-node body in the batch step, on the first node, with a nested srun that sees the whole
allocation, in exactly one combination: ``mpi: ""``, ``tasks`` = ``nodes``, ``tasks_per_gpu: 0``. Without ``mpi`` the
body runs inside a one-task step and srun fails or hangs; without ``tasks_per_gpu`` the number of tasks is wrong.
"""

import functools
import sys
from collections.abc import Callable, Collection
from typing import Any

from snakemake.iocontainers import InputFiles, Wildcards

from .. import command_line, stages
from ..errors import BadInputError
from ..site import start_check
from . import profile_values, submission_preview
from .sbatch import Allocation, option

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
    "constraint": "constraint",
    "qos": "qos",
}
# The plugin passes these on as soon as they are there, be they empty: a rule has them only where they are stated.
OPTIONAL = ("constraint", "qos")
# Resources that the plugin does not know: they become options in slurm_extra, and so reach every script.
FOLDED = {"reservation": "--reservation", "exclude": "--exclude", "nodelist": "--nodelist"}


# These rules run on the nodes of another one: what the profile gives to that one holds for both.
SAME_NODES = {stage.name: stage.nodes_of for stage in stages.ROWS if stage.nodes_of and not stage.local}


def _attempt(wildcards: Any, attempt: int) -> int:
    return attempt


def complete_resources(workflow: Any) -> dict[str, set[str]]:
    """Give every rule the resources that it may format into its shell command, and the plugin's combination.

    Returns:
        Rule name → the resources that rule, profile or command line state; all others are filled in here.

    Raises:
        BadInputError: a resource that means nothing, or that the plugin would refuse when the job is submitted.
    """
    for rule in workflow.rules:
        _understand(workflow, rule)
    _share_nodes(workflow)
    stated = {rule.name: set(FIELDS) & set(rule.resources) for rule in workflow.rules}
    for rule in workflow.rules:
        for name, field in FIELDS.items():
            if name not in rule.resources and name not in OPTIONAL:
                rule.resources[name] = getattr(Allocation(), field)
        _fold(workflow, rule)
        rule.resources["tasks"] = value(rule, "nodes")
        rule.resources["tasks_per_gpu"] = 0
        rule.resources["mpi"] = ""
        rule.resources["attempt"] = _attempt
    return stated


def _own(workflow: Any, rule_name: str) -> Any:
    """What profile or command line state for a rule by its name."""
    return workflow.resource_settings._parsed_overwrite_resources.get(rule_name, {})


def key(workflow: Any, rule_name: str, resource: str) -> str:
    """Where a rule's resource is written, for messages."""
    stage = stages.BY_NAME.get(rule_name)
    for name in (rule_name, stage and stage.nodes_of):
        if name and resource in _own(workflow, name):
            return f"profile, set-resources: {name}: {resource}"
    if resource in (workflow.resource_settings.default_resources or {}):
        return f"profile, default-resources: {resource}"
    return f"profile, set-resources: {rule_name}: {resource}"


def _understand(workflow: Any, rule: Any) -> None:
    """Replace what sinfo prints by what Snakemake takes; refuse what nothing reads."""
    for name in profile_values.INSTEAD:
        if name in rule.resources:
            instead, why = profile_values.INSTEAD[name]
            where = key(workflow, rule.name, name)
            raise BadInputError(f"{where}: {why}", f"write {instead} in its place")
    for name in ("runtime", "gres", "mem_mb"):
        if name in rule.resources:
            plain = profile_values.understood(name, rule.resources[name].raw, key(workflow, rule.name, name))
            if plain is not None:
                rule.resources[name] = plain
    if "mem_mb_per_cpu" in rule.resources:
        per_cpu = value(rule, "mem_mb_per_cpu")
        rule.resources["mem_mb_per_cpu"] = 0
        if per_cpu:  # one task runs on each node, so it is the same; a script by hand has no other way to say it
            cpus = value(rule, "cpus_per_task") if "cpus_per_task" in rule.resources else 1
            rule.resources["mem_mb"] = per_cpu * cpus


def _fold(workflow: Any, rule: Any) -> None:
    """Write the resources that the plugin does not know into slurm_extra, and look at that as the plugin will."""
    extra = value(rule, "slurm_extra")
    where = key(workflow, rule.name, "slurm_extra")
    try:
        profile_values.check_extra(extra, where)
        for name, flag in FOLDED.items():
            if name in rule.resources:
                extra = profile_values.with_option(extra, flag, str(value(rule, name)))
    except BadInputError as error:
        problem = error.problem if error.problem.startswith("profile, ") else f"{where}: {error.problem}"
        raise BadInputError(problem, error.fix) from None
    rule.resources["slurm_extra"] = extra


def _share_nodes(workflow: Any) -> None:
    """Give rules of ``SAME_NODES`` the other rule's resources, but for what the profile states for them by name."""
    rules = {rule.name: rule for rule in workflow.rules}
    for name, of in SAME_NODES.items():
        own = _own(workflow, name)
        for resource in (*FIELDS, *FOLDED):
            if resource not in own and resource in rules[of].resources:
                rules[name].resources[resource] = rules[of].resources[resource]
        if "runtime" not in own and stages.BY_NAME[name].minutes:
            rules[name].resources["runtime"] = stages.BY_NAME[name].minutes
        if "slurm_extra" not in own and "slurm_extra" in rules[name].resources:
            # Not the signal by which Slurm asks training to save: it could come at once in so short a job.
            extra = value(rules[name], "slurm_extra")
            rules[name].resources["slurm_extra"] = profile_values.with_option(extra, "--signal", "")


def add_spare_nodes(workflow: Any, spare: int) -> None:
    """Have training's job ask for more nodes than the profile says; preflight picks among them."""
    train = {rule.name: rule for rule in workflow.rules}["train"]
    if spare:
        train.resources["nodes"] = train.resources["tasks"] = value(train, "nodes") + spare


def leave_out(workflow: Any, hosts: Collection[str]) -> None:
    """Exclude nodes from training's job, beside those that the profile excludes."""
    train = {rule.name: rule for rule in workflow.rules}["train"]
    extra = value(train, "slurm_extra")
    before = profile_values.from_extra(extra, "--exclude", "-x")
    names = list(dict.fromkeys([*filter(None, [before]), *hosts]))
    extra = profile_values.with_option(profile_values.with_option(extra, "-x", ""), "--exclude", ",".join(names))
    train.resources["slurm_extra"] = extra


def value(rule: Any, name: str) -> Any:
    """A rule's resource on its first attempt; profile and command line give text that Snakemake evaluates as Python."""
    context = {"attempt": 1, "threads": 1, "rulename": rule.name, "async_run": rule.workflow.async_run}
    return rule.resources[name].evaluate(Wildcards(), input=InputFiles(), **context).value


def _value_or_default(rule: Any, name: str) -> Any:
    return value(rule, name) if name in rule.resources else getattr(Allocation(), FIELDS[name])


def allocation(rule: Any) -> Allocation:
    """The allocation a rule asks for on its first attempt."""
    return _named(rule.workflow, rule.name, {name: _value_or_default(rule, name) for name in FIELDS})


def _named(workflow: Any, rule_name: str, values: dict[str, Any]) -> Allocation:
    """An allocation, whose errors name the profile's key."""
    try:
        return Allocation(**{FIELDS[name]: one for name, one in values.items()})
    except BadInputError as error:
        resource = {"mem_mb": "mem_mb", "nodes": "nodes", "runtime": "runtime", "cpus_per_task": "cpus_per_task"}.get(
            error.problem.removeprefix("allocation: ").split()[0], "slurm_extra"
        )
        where = key(workflow, rule_name, resource)
        raise BadInputError(f"{where}: {error.problem.removeprefix('allocation: ')}", error.fix) from None


def deployment(workflow: Any) -> Allocation:
    """The allocation of a lasting deployment: the smoke test's, and what the profile sets for ``serve`` otherwise."""
    test, serve = workflow.get_rule("smoke_test"), workflow.get_rule("serve")
    own = _own(workflow, "serve")
    values = {name: _value_or_default(serve if name in own else test, name) for name in FIELDS}
    for name, flag in FOLDED.items():
        source = serve if name in own else test
        if name in source.resources:
            values["slurm_extra"] = profile_values.with_option(values["slurm_extra"], flag, str(value(source, name)))
    return _named(workflow, "serve", values)


def own_allocation(workflow: Any, rule_name: str) -> str:
    """Arguments of render_sbatch.py, as shell text in which Snakemake fills in the resources of the job it runs in."""
    stated = set(workflow.resource_settings.default_resources or {})
    for name in (rule_name, SAME_NODES.get(rule_name)):
        stated |= set(_own(workflow, name)) if name else set()
    names = [name for name in FIELDS if name not in OPTIONAL or name in stated]
    return " ".join(f"{option(FIELDS[name])}={{resources.{name}:q}}" for name in names)


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


def check_allocations(workflow: Any, rules: set[str], line: Callable[[Any, str], str] | None) -> list[str]:
    """Ask Slurm whether the jobs of ``rules`` can ever start; takes seconds at most, also where its tools hang.

    Args:
        workflow: Snakemake's workflow.
        rules: names of the rules to run.
        line: gives the sbatch options of a rule's job; None where rules become no jobs (``serve`` always submits one).

    Returns:
        Sentences on what may keep jobs waiting, and on what could not be checked.

    Raises:
        BadInputError: at least one job can never start; names every key that keeps it from that.
    """
    wanted = allocations(workflow)
    asked = {name: wanted[name] for name in sorted(rules & set(wanted)) if line or name == "serve"}
    if not asked:
        return []
    lines = {name: line(workflow, name) for name in asked if line and name != "serve"}
    return start_check.check(asked, functools.partial(key, workflow), functools.partial(_jobs_at_once, workflow), lines)


def _jobs_at_once(workflow: Any, rules: set[str]) -> int:
    """How many jobs of these rules Slurm holds at a time: model and data are prepared side by side."""
    beside = "prepare_model" in rules and rules & {"prepare_data", "tokenize_data"}
    return min(2 if beside else 1, workflow.resource_settings.nodes or 1)


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
        found |= set(stages.OVER_NODES)
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


def run_here(workflow: Any, names: Collection[str]) -> None:
    """Have rules run where Snakemake does, this time, without a job of their own."""
    workflow._localrules.update(names)


def is_asked_again(workflow: Any, name: str, forced: Collection[str]) -> bool:
    """Whether the person asked for a rule to run again: by name, with --forceall, or by changing its settings."""
    settings = workflow.dag_settings
    by_name = (name in settings.forcerun and name not in forced) or (settings.forcetargets and name in settings.targets)
    jobs = [job for job in workflow.dag.needrun_jobs() if job.rule.name == name]
    return by_name or settings.forceall or any(workflow.dag.reason(job).params_changed for job in jobs)


def submitted(workflow: Any) -> set[str]:
    """Names of the rules that become Slurm jobs under this profile; `serve` submits one itself."""
    plugin = workflow.executor_plugin.name  # `dryrun` in a dry run
    if (command_line.executor(sys.argv[1:]) if plugin == "dryrun" else plugin) != submission_preview.EXECUTOR:
        return set()
    return {rule.name for rule in workflow.rules if _is_job(workflow, rule)} | {"serve"}
