"""What a serving process's log says: how far a start is, its last lines, the exceptions in it."""

import re
from pathlib import Path

# Behind the prefixes of vLLM's log: the line that ends a traceback, or tells which process died. Pydantic's says only
# whose settings are wrong, and the next one what is.
EXCEPTION = re.compile(
    r"^(?:\([^\n]*?\) )*(?:ERROR [^\n]*?\] )?"
    r"([A-Za-z_][\w.]*(?:Error|Exception)\b[^\n]*|[A-Z]\w+[^\n]* died unexpectedly[^\n]*"
    r"|  (?:Value error|Assertion failed|Input should be)[^\n]*)",
    re.MULTILINE,
)
# Ray's word on a worker that is gone, wherever it ran; the head's log has it.
DEAD_ACTOR = re.compile(
    r"ActorDiedError[^\n]*\n(?:[^\n]*\n){0,8}?[^\n]*\tpid: (\d+)\s*\n(?:[^\n]*\n){0,4}?[^\n]*\tip: ([\w.:]+)"
)
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LONGEST_READ = 4 << 20  # bytes
SHOWN_EXCEPTIONS = 4

# Milestones of a start in vLLM's log, in no order: the one that comes last in the log is where it is.
PHASES = (
    (re.compile(r"Loading (?:safetensors|pt) checkpoint shards:\s*(\d+)% Completed"), "loading weights, {} %"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading weights took"), "weights loaded, preparing the engine"),
    (re.compile(r"Dynamo bytecode transform|[Cc]ompiling a graph|torch\.compile takes"), "compiling"),
    (re.compile(r"Capturing CUDA graph[^:]*:\s*(\d+)%"), "capturing CUDA graphs, {} %"),
    (re.compile(r"Capturing CUDA graph|Graph capturing"), "capturing CUDA graphs"),
    (re.compile(r"init engine .*took"), "engine ready, starting the API"),
    (re.compile(r"Starting vLLM (?:API )?server"), "starting the API"),
    (re.compile(r"DP group leader|headless multiproc executor"), "connecting the engine's processes"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine's processes"),
    (re.compile(r"[Pp]lacement group"), "waiting for Ray to place the engine's processes"),
    (re.compile(r"Ray runtime started"), "running the engine's processes through Ray"),
)


def last_lines(log: Path, count: int) -> list[str]:
    """The last ``count`` lines of a log; progress bars (carriage returns) show their last state."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, log.stat().st_size - 400 * count))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line[:400] for line in lines if line.strip()][-count:]


def exceptions(log: Path, since: int = 0) -> list[str]:
    """The first few different exceptions that a log names: the last lines often only say "see root cause above".

    Args:
        since: byte offset from which the log belongs to this start.
    """
    text = text_since(log, since)
    found = dict.fromkeys(match.group(1)[:400].strip() for match in EXCEPTION.finditer(text))
    return list(found)[:SHOWN_EXCEPTIONS]


def dead_actors(log: Path, since: int = 0) -> dict[str, str]:
    """Address of a node → process id of the worker that Ray has lost there, from the head's log."""
    return {address: pid for pid, address in DEAD_ACTOR.findall(text_since(log, since))}


def text_since(log: Path, since: int) -> str:
    """A log's text from a byte offset on, without colours; only the last part of a very long one."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(since, log.stat().st_size - LONGEST_READ))
            return ANSI_COLOUR.sub("", stream.read().decode(errors="replace"))
    except OSError:
        return ""


class PhaseReader:
    """Reads how far a start is from a growing log."""

    def __init__(self, log: Path, since: int = 0):
        self._log = log
        self._offset = since
        self.phase = "starting Python"

    def update(self) -> str:
        """Read what is new and return the current phase in words."""
        try:
            with open(self._log, "rb") as stream:
                stream.seek(self._offset)
                block = stream.read()
        except OSError:
            return self.phase
        self._offset += len(block)
        found = (-1, self.phase)
        text = block.decode(errors="replace")
        for pattern, words in PHASES:
            for match in pattern.finditer(text):
                found = max(found, (match.start(), words.format(*match.groups())))
        self.phase = found[1]
        return self.phase


class Progress:
    """How far the start is on each of several nodes, whose logs lie on storage that all of them share.

    Args:
        logs: node → its log, and the byte offset at which this start begins.
    """

    def __init__(self, logs: dict[str, tuple[Path, int]]):
        self._readers = {node: PhaseReader(log, since) for node, (log, since) in logs.items()}

    def update(self) -> str:
        """One line: the phase, or the phases by node where they differ."""
        phases = {node: reader.update() for node, reader in self._readers.items()}
        if len(set(phases.values())) == 1:
            return next(iter(phases.values()))
        return "; ".join(f"{node}: {phase}" for node, phase in phases.items())
