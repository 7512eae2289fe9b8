"""The commands of a deployment for reading, without starting anything."""

import shlex
from pathlib import Path

from . import versions, vllm_commands
from .settings import ServeSettings

TEMPORARY = Path("/tmp/serve-XXXXXXXX")
CACHES = Path("/tmp/deepseek-sft-UID/serve")
# Words instead of the numbers that are chosen when it starts.
RAY_PORTS = {"gcs_port": "GCS_PORT", "agent_port": "AGENT_PORT", "client_port": "CLIENT_PORT"}
API_PORTS = {"host": "HOST", "port": "PORT", "master_port": "MASTER_PORT", "rpc_port": "RPC_PORT"}


def listing(settings: ServeSettings, nodes: int, model: str, version: versions.Version | None) -> str:
    """What is started on each of ``nodes`` nodes, with variables that the nodes' processes get.

    Nodes after the second differ by their rank alone and are left out.

    Raises:
        BadInputError: the settings do not fit the nodes, or the installed vLLM.
    """
    settings.local_world_size(nodes)
    parts = []
    for rank in range(min(nodes, 2)):
        place = vllm_commands.Place(rank, nodes, f"ADDRESS_{rank}", f"INTERFACE_{rank}", "ADDRESS_0")
        ray = (RAY_PORTS["gcs_port"], "SECRET") if settings.backend == "ray" else None
        key = "SECRET" if rank == 0 else ""
        environment = vllm_commands.environment({}, settings, place, TEMPORARY, CACHES, ray=ray, api_key=key)
        lines = [f"# node {rank}{' (head)' if rank == 0 else ''}" + (f" of {nodes}" if nodes > 1 else "")]
        lines += [f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items())]
        if ray:
            lines.append(_joined(vllm_commands.ray_command("ray", settings, place, folder=TEMPORARY, **RAY_PORTS)))
        if rank == 0 or not ray:
            lines.append(
                _joined(vllm_commands.serve_command("vllm", model, settings, place, version=version, **API_PORTS))
            )
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _joined(words: list[str]) -> str:
    """One option a line, as people write long commands."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return " \\\n    ".join(" ".join(line) for line in lines)
