"""Command lines and environments of vLLM and Ray, by backend and role."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from . import versions
from .settings import ServeSettings

RAY_OBJECT_STORE_BYTES = 256 << 20  # vLLM moves tensors itself; Ray's default would take 30 % of the node's memory
# Variable → folder of what is compiled at a start. Their defaults lie below $HOME, where a quota is and all ranks write
# at once; DeepGEMM's and torch.compile's lie below vLLM's.
CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "CUDA_CACHE_PATH": "cuda",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A node's place among the nodes of the deployment.

    Attributes:
        rank: 0 for the head.
        nodes: number of nodes.
        address: this node's address.
        interface: interface that carries it.
        head: the head's address.
    """

    rank: int
    nodes: int
    address: str
    interface: str
    head: str


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs of the serving environment."""

    vllm: str
    ray: str
    python: str

    @classmethod
    def beside(cls, python: str) -> "Programs":
        """Those of the environment that ``python`` belongs to.

        Raises:
            BadInputError: vLLM is not installed there.
        """
        folder = Path(python).parent
        found = {name: shutil.which(name, path=f"{folder}:{os.environ.get('PATH', '')}") for name in ("vllm", "ray")}
        if not found["vllm"]:
            raise BadInputError(f"no program `vllm` in {folder} or on PATH", "build the environment: snakemake envs")
        return cls(found["vllm"], found["ray"] or "ray", python)


def serve_command(
    vllm: str,
    model: Path | str,
    settings: ServeSettings,
    place: Place,
    *,
    host: str,
    port: int,
    master_port: int,
    rpc_port: int,
    version: versions.Version | None = None,
) -> list[str]:
    """``vllm serve`` for this node: the API server on the head, a headless engine elsewhere.

    Args:
        vllm: the program.
        host, port: where the API listens; used on the head only.
        master_port: port of the head for vLLM's process group (native backend over several nodes).
        rpc_port: port of the head at which replicas on other nodes report.
        version: installed vLLM; None means current.

    Raises:
        BadInputError: the installed vLLM cannot be started that way.
    """
    flags: dict[str, Any] = {
        "served-model-name": settings.served_model_name,
        "max-model-len": settings.max_model_len,
        "tensor-parallel-size": settings.tensor_parallel_size,
        "pipeline-parallel-size": settings.pipeline_parallel_size,
        "data-parallel-size": settings.replicas if settings.replicas > 1 else None,
        "enable-expert-parallel": True if settings.expert_parallel else None,
        "load-format": settings.load_format if settings.load_format != "auto" else None,
        # Their defaults of 600 s (NCCL) and 1800 s (Gloo) would end nodes that wait for slower ones to load.
        "distributed-timeout-seconds": int(settings.distributed_timeout_s or settings.ready_timeout_s),
        "cpu-distributed-timeout-seconds": int(settings.distributed_timeout_s or settings.ready_timeout_s),
        "dtype": settings.dtype,
        "reasoning-parser": settings.reasoning_parser,
        "tool-call-parser": settings.tool_call_parser,
        "enable-auto-tool-choice": True if settings.tool_call_parser else None,
        "trust-remote-code": True if settings.trust_remote_code else None,
    }
    if settings.backend == "ray":
        # Not chosen by vLLM on its own any more: without it, more ranks than local devices is an error.
        flags["distributed-executor-backend"] = "ray"
    elif place.nodes > 1:
        flags |= {
            "distributed-executor-backend": "mp",
            "nnodes": place.nodes,
            "node-rank": place.rank,
            "master-addr": place.head,
            "master-port": master_port,
        }
        if settings.replicas > 1:
            flags["data-parallel-rpc-port"] = rpc_port  # else a fixed one, for all deployments
    if place.rank == 0:
        flags |= {"host": host, "port": port}
    else:
        flags["headless"] = True
    flags = {name: value for name, value in flags.items() if value is not None} | settings.flags
    return [vllm, "serve", str(model), *as_arguments(versions.adapt(flags, version))]


def as_arguments(flags: dict[str, Any]) -> list[str]:
    """Command-line words of flags; see ``ServeSettings.engine_args`` for what values mean."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if value is False:
            words.append(f"--no-{name}")
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value, separators=(",", ":")))
        elif isinstance(value, list):
            words += [str(entry) for entry in value]
        elif value is not True:
            words.append(str(value))
    return words


def ray_command(
    ray: str, settings: ServeSettings, place: Place, *, gcs_port: int, agent_port: int, client_port: int, folder: Path
) -> list[str]:
    """``ray start`` for this node, in the foreground, so that its end is noticed.

    Args:
        gcs_port: port of the head that nodes join at.
        agent_port, client_port: free ports of this node; Ray's fixed defaults would collide with another Ray there.
        folder: short node-local folder (Ray's socket paths must stay below 108 characters).
    """
    ranks = settings.local_world_size(place.nodes)
    joining = (
        ["--head", f"--port={gcs_port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false"]
        if place.rank == 0
        else [f"--address={place.head}:{gcs_port}"]
    )
    return [
        ray,
        "start",
        "--block",
        *joining,
        f"--node-ip-address={place.address}",
        f"--dashboard-agent-listen-port={agent_port}",
        # Worker processes take free ports instead of the fixed range 10002-19999.
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--num-gpus={ranks}",
        f"--num-cpus={ranks + 1}",
        f"--object-store-memory={RAY_OBJECT_STORE_BYTES}",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
    ]


def environment(
    inherited: dict[str, str],
    settings: ServeSettings,
    place: Place,
    folder: Path,
    caches: Path,
    *,
    ray: tuple[int, str] | None = None,
    api_key: str = "",
) -> dict[str, str]:
    """Environment of this node's serving processes; the settings' ``environment`` wins.

    Args:
        inherited: this process's environment.
        folder: node-local folder for sockets and temporary files.
        caches: node-local folder for what is compiled; a variable that is set already stays.
        ray: with backend ray, its port on the head and a secret; without one, whoever reaches that port could run code.
        api_key: what clients must send; empty lets everyone in.
    """
    ours = {
        # One address and one interface for all traffic; otherwise each library picks its own.
        "VLLM_HOST_IP": place.address,
        "GLOO_SOCKET_IFNAME": place.interface,
        # Its default of 600 s would end the start of a large model before our own deadline.
        "VLLM_ENGINE_READY_TIMEOUT_S": str(int(settings.ready_timeout_s)),
        # Compute nodes have no network, and nothing is reported home.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(folder),
        "VLLM_RPC_BASE_PATH": str(folder),
    }
    if place.nodes > 1 and "NCCL_SOCKET_IFNAME" not in inherited:
        ours["NCCL_SOCKET_IFNAME"] = f"={place.interface}"  # "=": this name exactly, not as a prefix
    if ray:
        gcs_port, token = ray
        ours |= {"RAY_ADDRESS": f"{place.head}:{gcs_port}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        ours["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # all nodes stop together: nothing is to be moved elsewhere
    if api_key:
        # A flag would show it to every user of the node. The second name is what `vllm bench` and OpenAI's client read.
        ours |= {"VLLM_API_KEY": api_key, "OPENAI_API_KEY": api_key}
    kept = {name: str(caches / place) for name, place in CACHES.items() if name not in inherited}
    return inherited | kept | ours | settings.variables
