"""Where this process runs: which node of which job, how many ranks, and where the ranks meet."""

import dataclasses
import functools
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping

import psutil

from ..errors import BadInputError

# name=address of the job's nodes, for programs in a container, which know neither Slurm nor names (macros.sbatch.j2).
ADDRESSES = "DEEPSEEK_SFT_NODE_ADDRESSES"
FIRST_PORT, PORTS = 20000, 12768  # ends where the range begins that Linux hands out to clients


@dataclasses.dataclass(frozen=True)
class NodeEnvironment:
    """This node's place in the job.

    Attributes:
        nodes: number of nodes.
        node_rank: this node's index.
        main_host: first node's name or address, where rank 0 listens.
        main_port: port of the rendezvous.
        ranks_per_node: processes per node.
        job_id: Slurm job id, or None outside Slurm.
        attempt: name of this start, the same on all nodes.
        hosts: names of all nodes in the order of their ranks.
    """

    nodes: int
    node_rank: int
    main_host: str
    main_port: int
    ranks_per_node: int
    job_id: str | None
    attempt: str
    hosts: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def detect(
    accelerator: str, ranks_per_node: int | None, environment: Mapping[str, str] = os.environ
) -> NodeEnvironment:
    """Read the node's place from Slurm's variables; one node without them.

    Raises:
        BadInputError: Slurm's variables contradict each other, or the number of ranks cannot be known.
    """
    ranks = ranks_per_node or _default_ranks(accelerator, environment)
    job_id = environment.get("SLURM_JOB_ID")
    if not job_id or "SLURM_NODEID" not in environment:
        attempt = f"{job_id or 'local'}-{os.getpid()}"
        return NodeEnvironment(1, 0, "127.0.0.1", _free_port(), ranks, job_id, attempt, (own_name(environment),))
    # The step may run on fewer nodes than the job has. Older versions of Slurm give the step's under the job's names.
    step = "SLURM_STEP_NODELIST" in environment and "SLURM_STEP_NUM_NODES" in environment
    nodes = _number(environment, "SLURM_STEP_NUM_NODES" if step else "SLURM_NNODES")
    node_rank = _number(environment, "SLURM_NODEID")
    hosts = expand_hosts(environment.get("SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST", ""))
    if len(hosts) != nodes or not 0 <= node_rank < nodes:
        raise BadInputError(
            f"Slurm says node {node_rank} of {nodes}, but SLURM_JOB_NODELIST names {len(hosts)}: {' '.join(hosts)}",
            "start train.py with srun, one task per node, on all nodes of the job",
        )
    tasks = environment.get("SLURM_NTASKS_PER_NODE", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    if not tasks.startswith("1"):
        raise BadInputError(f"train.py must be started once per node, Slurm says {tasks} tasks per node")
    port = FIRST_PORT + int(job_id) % PORTS if job_id.isdigit() else FIRST_PORT
    attempt = f"{job_id}-{environment.get('SLURM_RESTART_COUNT', '0')}-{environment.get('SLURM_STEP_ID', '0')}"
    return NodeEnvironment(nodes, node_rank, address_of(hosts[0]), port, ranks, job_id, attempt, tuple(hosts))


def own_name(environment: Mapping[str, str] = os.environ) -> str:
    """Slurm's name of this node, which may differ from its host name and is what ``--exclude`` takes."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


@functools.cache
def address_of(name: str) -> str:
    """A node's name where it resolves; otherwise its address, or host name, as Slurm knows it (NodeAddr, NodeHostName).

    A name that nobody can resolve comes back as it is: whoever uses it says so.
    """
    if told := _told(os.environ).get(name):
        return told
    if _resolves(name) or shutil.which("scontrol") is None:
        return name
    command = ["scontrol", "--oneliner", "show", "node", name]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return name
    known = re.findall(r"\b(?:NodeAddr|NodeHostName)=(\S+)", answer.stdout)
    return next((other for other in known if _resolves(other)), name)


def gloo_interface(nodes: int, environment: Mapping[str, str] = os.environ) -> str | None:
    """Interface for Gloo, which otherwise takes the one of the address that the host's own name resolves to.

    That name may lead nowhere, in a container above all, and then to loopback: on one node that is right; on several
    it is the interface with the address that the batch script found. None where nothing is known: Gloo's way will do.
    """
    if nodes == 1:
        return "lo"
    address = _told(environment).get(own_name(environment))
    found = psutil.net_if_addrs().items()
    return next((name for name, entries in found if address in [entry.address for entry in entries]), None)


def _told(environment: Mapping[str, str]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in environment.get(ADDRESSES, "").split())


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def expand_hosts(nodelist: str) -> list[str]:
    """Host names of a Slurm node list such as ``node[1-3],login``, in order.

    ``scontrol`` knows the syntax best. In a container it need not be: names with numbers in brackets are read here.

    Raises:
        BadInputError: the list is none.
    """
    if "[" not in nodelist:
        return [host for host in nodelist.split(",") if host]
    if shutil.which("scontrol") is None:
        return _expanded(nodelist)
    result = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BadInputError(f"scontrol show hostnames {nodelist} failed: {result.stderr.strip()}")
    return result.stdout.split()


def _expanded(nodelist: str) -> list[str]:
    """Raises BadInputError where a list is more than names with numbers in brackets."""
    found: list[str] = []
    for entry in re.split(r",(?![^\[]*\])", nodelist):
        if not re.fullmatch(r"(?:[^\[\],]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+", entry):
            raise BadInputError(
                f"cannot expand SLURM_JOB_NODELIST {nodelist}: there is no scontrol in PATH",
                "give the container Slurm's programs",
            )
        names = [""]
        for text, inside in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", entry):
            more = [text] if text else [number for part in inside.split(",") for number in _range(part)]
            names = [name + one for name in names for one in more]
        found += names
    return found


def _range(part: str) -> list[str]:
    first, _, last = part.partition("-")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]


def threads_per_rank(ranks: int, environment: Mapping[str, str] = os.environ) -> int:
    """CPU threads for each rank of this node: torch's own default of one starves the optimizer in host memory."""
    cores = environment.get("SLURM_CPUS_ON_NODE", "")
    available = int(cores) if cores.isdigit() else len(os.sched_getaffinity(0))
    return max(1, min(available, len(os.sched_getaffinity(0))) // ranks)


def _default_ranks(accelerator: str, environment: Mapping[str, str]) -> int:
    if accelerator == "cpu":
        raise BadInputError("on CPU the number of ranks per node must be given", "add --ranks-per-node N")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return len(visible.split(","))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and int(gpus) > 0:
        return int(gpus)
    raise BadInputError(
        "no GPUs: neither CUDA_VISIBLE_DEVICES nor SLURM_GPUS_ON_NODE names any",
        "ask Slurm for them (gres: gpu:8), or add --ranks-per-node N",
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise BadInputError(f"{name} is {value!r}, not a number", "start train.py with srun inside a Slurm job")
    return int(value)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
