"""Start torchrun on this node, pass signals on, and say what went wrong when a rank dies."""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import engines, environment_faults, files, json_files, secrets_file
from ..cli import say
from ..errors import BadInputError
from ..planning import host_memory
from ..python_path import with_library
from ..slurm.nodes import NodeEnvironment, gloo_interface, threads_per_rank
from . import early_stop, run_folder, watchdog

TORCHRUN = "deepseek_sft.training.torchrun"
TERMINATE_GRACE = 20.0  # seconds between SIGTERM and SIGKILL; Slurm's own KillWait is 30
CHECK_EVERY = 10.0  # seconds between two looks at the run folder's lock
TAIL_LINES, HANG_LINES = 25, 80  # shown of a rank's log; a hang's ends with all its threads
# A rank may lose its peer, which Slurm signals as well, before its node's program has seen the signal. After a crash a
# node ends a second later at the earliest (it waits for a status), and only then does Slurm terminate the others.
CONSEQUENCE = 0.5
PR_SET_PDEATHSIG = 1
# On CPU a third of a step went into page faults, since glibc gives large tensors back to the kernel after each use; and
# oneDNN keeps a compiled kernel for each of the ever-changing numbers of tokens per expert (1,024 of them: 0.6 GiB).
CPU_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
}


class Terminated(Exception):
    """SIGTERM or SIGINT arrived: stop at once, nothing is saved."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number


def die_with_parent(number: int) -> None:
    """Have the kernel send this process ``number`` when its parent dies: no rank outlives its launcher."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def attempt_folder(run: Path, attempt: str) -> Path:
    """Logs of one start."""
    return run / "logs" / attempt


def trace_file(run: Path, attempt: str, rank: int | str) -> Path:
    """What NCCL's flight recorder holds of a rank; torch appends the rank to the same name."""
    return attempt_folder(run, attempt) / f"nccl-trace-rank{rank}"


@dataclasses.dataclass(frozen=True)
class Start:
    """What the ranks of a start are told.

    Attributes:
        run: the run's folder.
        accelerator: ``cuda`` or ``cpu``.
        limits: seconds of each phase before anything is measured.
        stop_file: file whose appearance asks to save and stop.
        end_after: step after which a rehearsal ends without saving.
        derived: phases whose limit follows from measured times later.
        worker: the engine's module that each rank runs.
    """

    run: Path
    accelerator: str
    limits: dict[str, float]
    stop_file: Path | None = None
    end_after: int | None = None
    derived: tuple[str, ...] = ()
    worker: str = engines.XTUNER.worker


# torch's allocators on GPUs: rows of all lengths leave no gaps, and pinned memory is not rounded up to powers of two.
ALLOCATOR = f"expandable_segments:True,pinned_max_round_threshold_mb:{host_memory.ROUNDED_MB}"
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the first's name of before


def command_of(node: NodeEnvironment, start: Start) -> list[str]:
    """The torchrun command of this node: static rendezvous, no restarts (a requeue or a retry restarts the job)."""
    command = [sys.executable, "-m", TORCHRUN, str(_endings_file(start.run, node))]
    command += ["--nnodes", str(node.nodes), "--node-rank", str(node.node_rank)]
    command += ["--nproc-per-node", str(node.ranks_per_node), "--max-restarts", "0"]
    command += ["--master-addr", node.main_host, "--master-port", str(node.main_port)]
    logs = attempt_folder(start.run, node.attempt) / f"node{node.node_rank}"
    command += ["--log-dir", str(logs), "--redirects", "3", "--tee", "3", "--module", start.worker]
    command += ["--run-folder", str(start.run), "--attempt", node.attempt, "--accelerator", start.accelerator]
    for phase, seconds in start.limits.items():
        command += [f"--hang-{phase}", str(seconds)]
    command += ["--derived-limits", *start.derived] if start.derived else []
    command += ["--end-after", str(start.end_after)] if start.end_after else []
    return command + (["--stop-file", str(start.stop_file)] if start.stop_file else [])


def environment_of(node: NodeEnvironment, start: Start) -> dict[str, str]:
    """Environment of the ranks; what the user has set is kept."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = with_library(environment)
    environment["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"] = f"[node {node.node_rank} rank ${{rank}}] "
    tools = str(Path(sys.executable).parent)  # ninja's place, where an operator is compiled
    environment["PATH"] = os.pathsep.join([tools, environment.get("PATH", os.defpath)])
    defaults = {
        # For each node and start: a shared folder keeps the lock of a compilation that was killed, and the others'
        # next start waits for it; and what one node compiled need not run on another's processor.
        "TORCH_EXTENSIONS_DIR": str(attempt_folder(start.run, node.attempt) / f"compiled-node{node.node_rank}"),
        "OMP_NUM_THREADS": str(threads_per_rank(node.ranks_per_node)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if start.accelerator == "cuda":
        # NCCL's flight recorder: which rank had entered which collective. The watchdog writes it before it ends a
        # rank; NCCL itself, whose time-out is later, only where the watchdog could not.
        defaults |= {
            "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(trace_file(start.run, node.attempt, "")),
        }
        if not environment.keys() & set(ALLOCATOR_NAMES):
            defaults[ALLOCATOR_NAMES[0]] = ALLOCATOR
    if start.accelerator == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        defaults |= CPU_MEMORY
    if (start.accelerator == "cpu" or node.nodes > 1) and (interface := gloo_interface(node.nodes, environment)):
        defaults["GLOO_SOCKET_IFNAME"] = interface
    own = secrets_file.read(Path(path)) if (path := environment.get(secrets_file.VARIABLE)) else {}
    return defaults | environment | own


def run_ranks(node: NodeEnvironment, start: Start, check: Callable[[], None] | None = None) -> int:
    """Run this node's ranks to their end and return torchrun's exit code.

    Args:
        check: called every few seconds; what it raises ends the ranks and is passed on.

    USR1 becomes a stop request that the ranks see after their current step. torchrun itself ignores it: Slurm sends
    it to every process of the step, and its default action would kill them.

    Raises:
        Terminated: on SIGTERM or SIGINT, once the ranks are gone.
    """
    attempt_folder(start.run, node.attempt).mkdir(parents=True, exist_ok=True)

    def before_exec() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        early_stop.allow_termination()
        die_with_parent(signal.SIGTERM)

    with _handlers(start.run):
        if early_stop.arrived():
            (start.run / run_folder.STOP).touch()
        process = subprocess.Popen(
            command_of(node, start),
            env=environment_of(node, start),
            preexec_fn=before_exec,  # safe: this process has one thread
            start_new_session=True,
        )
        try:
            return _wait(process, check)
        except BaseException as error:
            if isinstance(error, Terminated):
                _note_termination(start.run, node, error.number)
            _end(process)
            raise


def _wait(process: subprocess.Popen, check: Callable[[], None] | None) -> int:
    if check is None:
        return process.wait()
    while True:
        try:
            return process.wait(CHECK_EVERY)
        except subprocess.TimeoutExpired:
            check()


def termination(run: Path, node: NodeEnvironment) -> dict[str, Any] | None:
    """The first termination of this start on any node, ``host`` and ``signal``; None where a rank had crashed before.

    Ranks that lose a terminated peer leave words as crashed ones do: those count that came before the signal.
    """
    folder = attempt_folder(run, node.attempt)
    notes = _read_all(_note_file(run, node, number) for number in range(node.nodes))
    first = min(notes, key=lambda note: note["time"], default=None)
    records = _read_all(folder.glob("failure-rank*.json"))
    if first is None or any(record["time"] < first["time"] - CONSEQUENCE for record in records):
        return None
    heard = {str(record["rank"]) for record in records}
    endings = _read_all(folder.glob("endings-node*.json"))
    stops = (-signal.SIGTERM, -signal.SIGINT)
    killed = any(rank not in heard and code not in stops for codes in endings for rank, code in codes.items())
    return None if killed else first


def environment_fault(run: Path, node: NodeEnvironment) -> BadInputError | None:
    """The fault of a disk or machine that ended this start; None if there was none.

    Where no rank could leave a word, the run folder is written to: a full disk takes last words as well.
    """
    records = _read_all(attempt_folder(run, node.attempt).glob("failure-rank*.json"))
    first = min(records, key=lambda record: record["time"], default={})
    if "fault" in first:
        return BadInputError(
            f"rank {first['rank']} on {first['host']}: {first['fault']['problem']}", first["fault"]["fix"]
        )
    return environment_faults.probe(run)


def explain_failure(run: Path, node: NodeEnvironment) -> str:
    """What is known of a crash: the ranks that left no message, the first that left one, and the last lines of one."""
    folder = attempt_folder(run, node.attempt)
    records = _read_all(folder.glob("failure-rank*.json"))
    hung = [record for record in records if "hang" in record]
    first = min(records, key=lambda record: record["time"], default=None)
    if hung and len(hung) == len(records):
        lines = watchdog.explain(hung, node.world_size, node.ranks_per_node, node.hosts)
        suspects = watchdog.suspects(hung, node.world_size)
    else:
        silent = _without_word(run, node, {record["rank"] for record in records})
        lines = [f"rank {first['rank']} on {first['host']}: {first['error']}"] if first else []
        lines += [f"without a last word on this node: rank {_list(ranks)} ({end})" for end, ranks in silent.items()]
        suspects = [rank for ranks in silent.values() for rank in ranks]
    known = hung or _endings_file(run, node).exists()  # that the silent ones were no victims of torchrun
    if first and not (suspects and known):
        suspects = [first["rank"]]
    shown = suspects[0] if suspects else node.node_rank * node.ranks_per_node
    logs = sorted((folder / f"node{shown // node.ranks_per_node}").glob(f"**/{shown % node.ranks_per_node}/stderr.log"))
    if logs:
        text = logs[-1].read_text(errors="replace").splitlines()[-(HANG_LINES if hung else TAIL_LINES) :]
        lines += [f"last lines of rank {shown} ({logs[-1]}):", *(f"  | {line}" for line in text)]
    return "\n".join(lines) or f"no rank left a message; logs are in {folder}"


def _without_word(run: Path, node: NodeEnvironment, heard: set[int]) -> dict[str, list[int]]:
    """This node's ranks that left no message, by how they ended; without those that torchrun stopped after a failure.

    Args:
        heard: ranks that left a message.
    """
    first = node.node_rank * node.ranks_per_node
    silent = [rank for rank in range(first, first + node.ranks_per_node) if rank not in heard]
    records = _read_all([_endings_file(run, node)])
    if not records:  # torchrun itself was ended, or saw no rank fail
        return {"killed from outside, or out of memory": silent} if silent else {}
    codes = {rank: records[0][str(rank)] for rank in silent if str(rank) in records[0]}
    if heard or any(code != -signal.SIGTERM for code in codes.values()):
        codes = {rank: code for rank, code in codes.items() if code != -signal.SIGTERM}
    ends: dict[str, list[int]] = {}
    for rank, code in sorted(codes.items()):
        ends.setdefault(_describe(code), []).append(rank)
    return ends


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed from outside, or out of memory: {name}" if code == -signal.SIGKILL else f"ended by {name}"


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _endings_file(run: Path, node: NodeEnvironment) -> Path:
    """Exit codes of this node's ranks that failed, see ``torchrun``."""
    return attempt_folder(run, node.attempt) / f"endings-node{node.node_rank}.json"


def _note_file(run: Path, node: NodeEnvironment, number: int) -> Path:
    return attempt_folder(run, node.attempt) / f"terminated-node{number}.json"


def _note_termination(run: Path, node: NodeEnvironment, number: int) -> None:
    """Say when this node was told to end, so that no node takes what follows for a crash."""
    note = {"time": time.time(), "host": socket.gethostname(), "signal": number}
    with contextlib.suppress(OSError):  # a full disk must not keep the ranks alive
        files.write_text(_note_file(run, node, node.node_rank), json.dumps(note))


def _read_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    records = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            records.append(json_files.load(path))
    return records


@contextlib.contextmanager
def _handlers(run: Path) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        if not (run / run_folder.STOP).exists():  # the signal is repeated
            say(f"{signal.Signals(number).name}: saving after the current step, then stopping")
        (run / run_folder.STOP).touch()

    def terminate(number: int, frame: object) -> None:
        raise Terminated(number)

    before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, stop)}
    before |= {number: signal.signal(number, terminate) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        early_stop.allow_termination()
        yield
    finally:
        early_stop.hold_termination()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen) -> None:
    """Stop torchrun, which stops its ranks; kill its session if that takes too long."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    process.terminate()
    try:
        process.wait(TERMINATE_GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
