"""How a deployment ends before its time, and what the causes are that its logs name."""

import dataclasses
import re
from typing import Any

from ..errors import BadInputError, CrashError

KILLED = re.compile(r"killed by|is gone")
LOST = re.compile(r"has gone")
NO_MEMORY = re.compile(r"for lack of memory")
_KILLED_OR_LOST = re.compile(f"{KILLED.pattern}|{LOST.pattern}")
KILLED_WORKER = re.compile(r"WorkerProc.* died unexpectedly|worker.*died unexpectedly", re.IGNORECASE)
MEMORY_HINT = (
    "if nobody ended it, the kernel or Slurm did for lack of memory: compare the job's memory with `mem_mb` of this "
    "rule in the profile, and look at /dev/shm (what lies there counts as memory)"
)


@dataclasses.dataclass(frozen=True)
class Cause:
    """A cause that a log names.

    Attributes:
        pattern: finds it in an exception or one of the last lines.
        problem: what it means.
        fix: what to change.
        permanent: whether the same start would fail again.
    """

    pattern: re.Pattern[str]
    problem: str
    fix: str
    permanent: bool = True


CAUSES = (
    Cause(
        re.compile(r"^(?:vllm|ray)(?: \w+)?: error: ", re.MULTILINE),
        "vLLM does not accept its command line",
        "see serve.engine_args; `vllm serve --help=all` lists the options of the installed version",
    ),
    Cause(
        re.compile(r"OutOfMemoryError|CUDA out of memory|Free memory on device .* is less than"),
        "out of GPU memory",
        "use more GPUs (serve.tensor_parallel_size, serve.pipeline_parallel_size and the profile's nodes), set "
        "serve.engine_args gpu-memory-utilization lower if something else runs there, or lower serve.max_model_len",
    ),
    Cause(
        re.compile(r"No available memory for the cache|larger than the (?:available KV|maximum number of tokens)"),
        "out of memory for the KV cache",
        "lower serve.max_model_len, raise serve.engine_args gpu-memory-utilization (or kv-cache-memory-bytes where it "
        "is set), or use more GPUs",
    ),
    Cause(
        re.compile(r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|^MemoryError", re.MULTILINE),
        "out of host memory",
        "raise `mem_mb` of this rule in the profile",
    ),
    Cause(
        re.compile(r"No space left on device"),
        "a file system of the node is full",
        "look at /dev/shm and /tmp of that node",
    ),
    Cause(
        re.compile(r"[Aa]ddress already in use|EADDRINUSE"),
        "a port was taken by another program between its choice and its use",
        "start again; with serve.port set, choose another one or 0 for a free one",
        permanent=False,
    ),
    Cause(
        re.compile(r"could not locate think start/end tokens"),
        "the tokenizer lacks the tokens that serve.reasoning_parser looks for",
        "set serve.reasoning_parser to the parser of this model, or null",
    ),
    Cause(
        re.compile(r"SafetensorError|Cannot find any model weights|e_score_correction_bias|size mismatch for"),
        "the weights do not fit the model's config.json",
        "make the model folder again: snakemake --profile <profile> --forcerun convert_checkpoint",
    ),
    Cause(
        re.compile(r"is not supported by MLA"),
        "the model's attention dimensions are not those of the release, which vLLM's MLA needs",
        "set serve.environment VLLM_MLA_DISABLE: 1",
    ),
    Cause(
        re.compile(r"No module named 'ray'|No such file or directory: 'ray'|Please install Ray"),
        "Ray is not installed in the serving environment",
        "set serve.backend: native, or install ray there",
    ),
    Cause(
        re.compile(r"NCCL error|ncclSystemError|ncclRemoteError|ncclInternalError"),
        "NCCL failed to connect the GPUs",
        "set serve.network_interface to the interface between the nodes; serve.environment NCCL_DEBUG: INFO tells more",
        permanent=False,
    ),
)  # fmt: skip


def lack_of_memory(killed: int) -> str:
    """What is added to how a process ended, where the kernel has killed some of its node."""
    return f"; the kernel killed {killed} process{'es' if killed > 1 else ''} here for lack of memory"


class StopRequest(Exception):
    """The head ends the deployment in order."""


class NodeFailure(CrashError):
    """Processes that ended on their own, as the nodes reported them.

    Args:
        reports: ``{"node", "process", "exit", "log", "exceptions", "lines"}`` each.
    """

    def __init__(self, reports: list[dict[str, Any]]):
        # A killed process is a likelier cause than one that gave up with an exit code of its own.
        self.reports = sorted(reports, key=lambda report: not _KILLED_OR_LOST.search(report["exit"]))
        parts = []
        for report in self.reports:
            lines = "".join(f"\n  {report['node']}| {line}" for line in report["lines"])
            where = f"; last lines of {report['log']}:{lines}" if report["lines"] else ""
            named = "".join(f"\n  {report['node']}! {line}" for line in report["exceptions"])
            parts.append(f"{report['node']}: {report['process']} {report['exit']}{where}{named}")
        problem, fix = "the deployment ended because of a failure", ""
        found = find_cause(self.reports)
        without_memory = next((report for report in self.reports if NO_MEMORY.search(report["exit"])), None)
        if without_memory:
            problem = f"the deployment ended: {without_memory['node']}: out of host memory"
            fix = "raise `mem_mb` of this rule in the profile; what lies in /dev/shm counts too"
            self.exit_code = BadInputError.exit_code
        elif found:
            node, cause, line = found
            problem, fix = f"the deployment ended: {node}: {cause.problem} ({line})", cause.fix
            if cause.permanent:
                self.exit_code = BadInputError.exit_code
        elif any(_killed(report) for report in self.reports):
            fix = MEMORY_HINT
        super().__init__("\n".join([problem, *parts]), fix)


def find_cause(reports: list[dict[str, Any]]) -> tuple[str, Cause, str] | None:
    """Node, cause, and the line that names it; None where no known cause is named.

    A killed process is a cause in itself: what the others say is how they noticed.
    """
    if any(KILLED.search(report["exit"]) for report in reports):
        return None
    for report in reports:
        for line in [*report["exceptions"], *report["lines"]]:
            for cause in CAUSES:
                if cause.pattern.search(line):
                    return report["node"], cause, line.strip()[:300]
    return None


def _killed(report: dict[str, Any]) -> bool:
    if "SIGKILL" in report["exit"] or LOST.search(report["exit"]):
        return True
    return any(KILLED_WORKER.search(line) for line in report["exceptions"])
