"""What Snakemake's Slurm plugin would submit for a rule, as text to read before anything runs.

The lines come from the plugin's own code (pinned), which is given a job of the rule. What only a submission knows has a
name in capitals instead.
"""

import re
from typing import Any

from snakemake.jobs import Job
from snakemake.logging import logger
from snakemake_executor_plugin_slurm import Executor, _select_logdir
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string

from ..cluster_jobs import jobs

EXECUTOR = "slurm"
RUN_ID, FINGERPRINT = "RUN-ID", "FINGERPRINT"


class _Job(Job):
    """A job that is not in the graph, and so has no number there; only groups of jobs would show theirs."""

    @property
    def jobid(self) -> int:
        return 0


class _Preview(Executor):
    """The plugin's executor with nothing started: no thread that waits for jobs, no questions to Slurm."""

    def __init__(self, workflow: Any):
        self.workflow, self.dag, self.logger = workflow, workflow.dag, logger
        self.executor_settings, self.snakefile = workflow.executor_settings, workflow.main_snakefile

    @property
    def tmpdir(self) -> str:
        return str(self.workflow.workdir_init)  # as workflow/slurm_commands leaves it


def is_previewed(workflow: Any) -> bool:
    """Whether rules become Slurm jobs under this profile."""
    plugin = workflow.executor_plugin
    return plugin is not None and plugin.name == EXECUTOR


def options(workflow: Any, rule_name: str) -> str:
    """The options of sbatch for one rule, as shell text."""
    job = _Job(workflow.get_rule(rule_name), workflow.dag, {}, {})
    return _call(workflow, job, f"rule_{rule_name}").removeprefix("sbatch ")


def _call(workflow: Any, job: Job, comment: str) -> str:
    account, partition = job.resources.get("slurm_account"), job.resources.get("slurm_partition")
    chosen = {
        "run_uuid": RUN_ID,
        "slurm_logfile": _select_logdir(workflow) / f"rule_{job.name}" / "%j.log",
        "comment_str": comment,
        "account": f" -A {account}" if account else "",
        "partition": f" -p {partition}" if partition else "",
        "workdir": workflow.workdir_init,
    }
    return get_submit_command(job, chosen, settings=workflow.executor_settings) + set_gres_string(job)


def preview(workflow: Any, rule_name: str, experiment: str) -> str:
    """The text for one rule: the sbatch line, the command it wraps, and the rule's own command.

    Args:
        workflow: Snakemake's workflow, with its graph of jobs built and the Slurm executor chosen.
        rule_name: a rule without wildcards that is not local.
        experiment: its name, which stands in the comment by which the job is found again.
    """
    job = _Job(workflow.get_rule(rule_name), workflow.dag, {}, {})
    account, partition = job.resources.get("slurm_account"), job.resources.get("slurm_partition")
    call = _call(workflow, job, jobs.comment(rule_name, experiment, FINGERPRINT))
    call = call.replace("sbatch ", f"sbatch {jobs.APPEND} ", 1)
    asked = [name for name, given in (("account", account), ("partition", partition)) if not given]
    lines = [
        "This is a preview, not a script: what `snakemake` submits for rule "
        f"{rule_name} with this profile, made by the Slurm plugin's own code.",
        f"{RUN_ID} and {FINGERPRINT} (of params and inputs) are chosen at submission.",
        *(f"No {name} is given: the plugin asks Slurm for your default one." for name in asked),
        "",
        "---- the job is submitted with",
        _one_option_a_line(f'{re.sub(" +", " ", call)} --wrap="THE COMMAND BELOW"'),
        "",
        "---- it runs Snakemake once more, on its first node, for this rule alone",
        _one_option_a_line(_Preview(workflow).format_job_exec(job)),
        "",
        "---- which runs the rule's command",
        job.shellcmd.strip(),
    ]
    return "\n".join(lines)


def _one_option_a_line(command: str) -> str:
    return re.sub(r" (?=--?[a-zA-Z])", " \\\n    ", command)
