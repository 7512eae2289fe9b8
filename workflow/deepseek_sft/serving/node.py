"""One node's share of a deployment: start its processes, watch all of them everywhere, stop everything at the end.

The same program runs once on every node. The head starts the API server and decides when it is over; the others run
their part of the engine until the head says so. Whatever ends first ends the whole deployment, on every node.
"""

import contextlib
import http.client
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import files, secrets_file
from ..cli import say
from ..errors import CrashError, StageError, StoppedError
from ..python_path import with_library
from . import (
    api_keys,
    caches,
    lasting_endpoint,
    model_folder,
    node_addresses,
    node_channel,
    processes,
    versions,
    vllm_commands,
)
from .failures import NodeFailure, StopRequest
from .server_logs import Progress
from .settings import ServeSettings
from .vllm_commands import Programs
from .watch import SETTLE_S, Watch

JOIN_TIMEOUT_S = 600  # nodes of one srun start within seconds; a slow shared file system can take minutes
FAILURE_GRACE_S = 5.0  # a broken engine has nothing to save
STOPPED_GRACE_S = 2.5  # Slurm kills this program too, KillWait after its TERM (often 30 s, some sites 5 s)
HEALTH_EVERY_S = 10


class Node:
    """Runs one node's share; ``run`` returns when the deployment is over.

    Args:
        settings: the deployment's settings.
        model: model folder.
        run_dir: folder of this deployment, shared by the nodes.
        programs: vLLM, Ray and Python.
        checks: given URL, seconds until ready and the nodes' names, the commands to run one after the other, by name,
            until one fails; its exit code becomes this program's. None for a lasting deployment.
    """

    def __init__(
        self,
        settings: ServeSettings,
        model: Path,
        run_dir: Path,
        programs: Programs,
        checks: Callable[[str, float, list[str]], dict[str, list[str]]] | None = None,
    ):
        self.settings = settings if checks else settings.lasting
        self.model = model
        self.run_dir = run_dir
        self.programs = programs
        self.checks = checks
        self.watch = Watch(run_dir)
        self.place: vllm_commands.Place | None = None
        self.api_key = ""  # on the head
        self.api_key_file: Path | None = None
        self.started = time.monotonic()

    def run(self) -> int:
        """Serve until the end; returns the exit code where the end is in order.

        Raises:
            BadInputError: settings and allocation do not fit together.
            NodeFailure: a process on any node, or a whole node, ended on its own.
            StoppedError: a signal asked to stop.
            CrashError: a deadline passed.
        """
        self.settings.local_world_size(self.watch.nodes)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        processes.adopt_orphans()
        self.watch.catch_signals()
        # Short and on the node itself: sockets of Ray and vLLM live here, and their paths must stay below 108 bytes.
        folder = Path(tempfile.mkdtemp(prefix="serve-", dir="/tmp"))
        outcome: dict[str, Any] = {"event": "stop"}
        grace = self.settings.stop_grace_s
        try:
            return self._run_head(folder) if self.watch.rank == 0 else self._run_worker(folder)
        except StopRequest:
            return 0
        except NodeFailure as first:
            failure = NodeFailure(self.watch.settle(first.reports))
            outcome = {"event": "failure", "reports": failure.reports}
            grace = min(grace, FAILURE_GRACE_S)
            raise failure from None
        except StageError as error:
            if isinstance(error, StoppedError):
                grace = min(grace, STOPPED_GRACE_S)
            outcome = {"event": "error", "problem": error.problem, "fix": error.fix, "exit_code": error.exit_code}
            raise
        finally:
            self.watch.end(outcome, grace, folder)

    def _run_head(self, folder: Path) -> int:
        settings, watch = self.settings, self.watch
        alone = watch.nodes == 1 and not settings.network_interface
        address = "127.0.0.1" if alone else node_addresses.head_address(settings.network_interface)
        self._take_place(address, address)
        if watch.nodes > 1:
            watch.channel = node_channel.HeadChannel(address, self.run_dir)
            watch.wait(lambda: len(watch.channel.hellos) == watch.nodes - 1, JOIN_TIMEOUT_S, self._missing_nodes)
        self._check_before_start()
        host, reach, api_port = self._api_address(address)
        master_port, gcs_port, rpc_port = node_addresses.free_ports(address, 3)
        ray_token = secrets.token_hex(32)
        environment = self._environment(folder, gcs_port, ray_token)
        if settings.backend == "ray":
            self._start_ray(folder, environment, gcs_port)
            watch.wait(
                lambda: node_addresses.is_open(address, gcs_port), JOIN_TIMEOUT_S, lambda: "waiting for Ray's head"
            )
        if watch.channel:
            ports = {"master_port": master_port, "gcs_port": gcs_port, "rpc_port": rpc_port}
            watch.channel.broadcast({"event": "start", "ray_token": ray_token} | ports)
        if settings.backend == "ray":
            self._wait_for_ray(environment, gcs_port)
        self._start_vllm(environment, host, api_port, (master_port, rpc_port))
        self._wait_until_ready(reach, api_port)
        ready = time.monotonic() - self.started
        url = f"http://{reach}:{api_port}"
        say(f"ready after {ready:.1f} s: {url}, model {settings.served_model_name}")
        self._record_processes()
        if watch.channel:
            watch.channel.broadcast({"event": "ready"})
        if self.checks:
            return self._run_checks(self.checks(url, ready, self._all_nodes()), environment)
        return self._stay(url, reach, api_port)

    def _run_worker(self, folder: Path) -> int:
        watch = self.watch
        watch.wait(self._join, JOIN_TIMEOUT_S, lambda: f"waiting for the head node to appear in {self.run_dir}")
        self._check_before_start()
        # No deadline of its own from here on: the head has them all, and its end is noticed.
        watch.wait(lambda: watch.start_message is not None, None, lambda: "waiting for the other nodes")
        master_port, gcs_port, rpc_port = (watch.start_message[f"{name}_port"] for name in ("master", "gcs", "rpc"))
        environment = self._environment(folder, gcs_port, watch.start_message["ray_token"])
        if self.settings.backend == "ray":
            self._start_ray(folder, environment, gcs_port)
        else:
            self._start_vllm(environment, "", 0, (master_port, rpc_port))
        watch.wait(lambda: watch.ready, None, None)
        self._record_processes()
        watch.wait(lambda: False, None, None)
        raise AssertionError("unreachable: the wait ends by an exception only")

    # -- finding each other ---------------------------------------------------------------------------------------

    def _take_place(self, address: str, head: str) -> None:
        """Settle this node's one address and write ``<node>.json``."""
        watch = self.watch
        interface = node_addresses.interface_of(address)
        self.place = vllm_commands.Place(watch.rank, watch.nodes, address, interface, head)
        self._record_processes()
        say(f"{watch.name}: rank {watch.rank} of {watch.nodes}, address {address} ({interface}), log {watch.log}")

    def _record_processes(self) -> None:
        """Write ``<node>.json``: who this node is and what runs on it now."""
        watch = self.watch
        entry = {"node": watch.name, "rank": watch.rank, "address": self.place.address}
        entry |= {"interface": self.place.interface, "pid": os.getpid(), "log": str(watch.log)}
        entry["processes"] = processes.describe(watch.children)
        files.write_json(self.run_dir / f"{watch.name}.json", entry)

    def _join(self) -> bool:
        found = node_channel.read_rendezvous(self.run_dir)
        if not found:
            return False
        if not self.place:
            interface = self.settings.network_interface
            address = (
                node_addresses.interface_address(interface)
                if interface
                else node_addresses.address_towards(found["address"])
            )
            self._take_place(address, found["address"])
        self.watch.channel = node_channel.join_head(found, {"node": self.watch.name, "log_start": self.watch.log_start})
        return self.watch.channel is not None

    def _missing_nodes(self) -> str:
        here = self._all_nodes()
        return f"waiting for {self.watch.nodes - len(here)} of {self.watch.nodes} nodes; here: {', '.join(here)}"

    def _all_nodes(self) -> list[str]:
        return [self.watch.name, *self._hellos()]

    def _hellos(self) -> dict[str, node_channel.Message]:
        """What the other nodes said when they came, on the head."""
        return self.watch.channel.hellos if self.watch.channel else {}

    def _check_before_start(self) -> None:
        """What can be found out at once: a wrong model folder, a key that cannot be used.

        Not before the nodes are connected, so that all of them end with the same message and exit code.
        """
        model_folder.check(self.model, self.settings)
        if self.watch.rank == 0:
            if self.checks:
                self.api_key = api_keys.fresh()
            else:
                default = self.run_dir.parent / api_keys.KEY_FILE
                self.api_key, self.api_key_file = api_keys.read_or_make(self.settings.api_key_file, default)

    def _api_address(self, address: str) -> tuple[str, str, int]:
        """Where the API listens, the address it is reached at, and its port.

        A smoke test needs nobody else: loopback and a free port. A lasting deployment takes the settings, else the
        head's address on the cluster's network, or loopback outside Slurm.

        Raises:
            BadInputError: something listens at the configured port, or the configured address is not this node's.
        """
        if self.checks:
            return "127.0.0.1", "127.0.0.1", node_addresses.free_ports("127.0.0.1", 1)[0]
        settings = self.settings
        tunnels = settings.host == "127.0.0.1"  # then nobody asks where the node is reached
        in_cluster = (
            node_addresses.head_address(settings.network_interface)
            if "SLURM_JOB_ID" in os.environ and not tunnels
            else address
        )
        host = settings.host or in_cluster
        port = settings.port or node_addresses.free_ports(host, 1)[0]
        node_addresses.check_free(host, port)
        return host, in_cluster if host == "0.0.0.0" else host, port

    # -- starting -------------------------------------------------------------------------------------------------

    def _environment(self, folder: Path, gcs_port: int, ray_token: str) -> dict[str, str]:
        ray = (gcs_port, ray_token) if self.settings.backend == "ray" else None
        inherited = dict(os.environ)
        own = secrets_file.read(Path(self.settings.secrets_file)) if self.settings.secrets_file else {}
        kept = caches.folder(folder)
        found = vllm_commands.environment(
            inherited, self.settings, self.place, folder, kept, ray=ray, api_key=self.api_key
        )
        return found | own

    def _start_vllm(self, environment: dict[str, str], host: str, port: int, of_head: tuple[int, int]) -> None:
        command = vllm_commands.serve_command(
            self.programs.vllm,
            self.model,
            self.settings,
            self.place,
            host=host,
            port=port,
            master_port=of_head[0],
            rpc_port=of_head[1],
            version=versions.installed(),
        )
        self.watch.start("vllm", command, environment)

    def _start_ray(self, folder: Path, environment: dict[str, str], gcs_port: int) -> None:
        agent_port, client_port = node_addresses.free_ports(self.place.address, 2)
        command = vllm_commands.ray_command(
            self.programs.ray,
            self.settings,
            self.place,
            gcs_port=gcs_port,
            agent_port=agent_port,
            client_port=client_port,
            folder=folder,
        )
        # `ray start --head` refuses to start while this variable names a cluster.
        environment = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        self.watch.start("ray", command, environment)

    def _wait_for_ray(self, environment: dict[str, str], gcs_port: int) -> None:
        """Until Ray itself counts all nodes: its placement would otherwise wait silently for half an hour."""
        nodes = self.watch.nodes
        command = [self.programs.python, "-m", f"{__package__}.ray_nodes", f"{self.place.head}:{gcs_port}", str(nodes)]
        environment = environment | {"PYTHONPATH": with_library(environment)}
        child = self.watch.start("ray_nodes", command, environment, ends=True)
        self.watch.wait(
            lambda: child.exit_code() is not None, JOIN_TIMEOUT_S, lambda: f"waiting for Ray to count {nodes} nodes"
        )
        if child.exit_code():
            raise NodeFailure([self.watch.report(child)])

    # -- serving --------------------------------------------------------------------------------------------------

    def _wait_until_ready(self, host: str, port: int) -> None:
        here = self._all_nodes()
        starts = {self.watch.name: self.watch.log_start}
        starts |= {node: hello.get("log_start", 0) for node, hello in self._hellos().items()}
        progress = Progress({node: (self.run_dir / f"{node}.log", starts[node]) for node in here})
        self.watch.wait(
            lambda: health(host, port) == 200,
            self.settings.ready_timeout_s,
            lambda: f"waiting for http://{host}:{port}/health: {progress.update()}",
            "if the log shows that it was still making progress, raise serve.ready_timeout_s",
        )

    def _run_checks(self, commands: dict[str, list[str]], environment: dict[str, str]) -> int:
        code = 0
        for name, command in commands.items():
            child = self.watch.start(name, command, environment, ends=True, to_log=False)
            self.watch.wait(lambda child=child: child.exit_code() is not None, None, None)
            if code := child.exit_code():
                break
        if code:
            # A dead engine fails checks too; then the engine is the news.
            with contextlib.suppress(StopRequest):
                self.watch.wait(lambda: False, SETTLE_S, None, give_up=False)
        return code if code >= 0 else CrashError.exit_code

    def _stay(self, url: str, host: str, port: int) -> int:
        endpoint = lasting_endpoint.Endpoint(
            url=f"{url}/v1",
            model=self.settings.served_model_name,
            nodes=self._all_nodes(),
            api_key_file=str(self.api_key_file),
            stop=lasting_endpoint.how_to_stop(self.run_dir),
        )
        file = self.run_dir / lasting_endpoint.ENDPOINT
        endpoint.write(file)
        say(endpoint.text())
        misses = 0
        try:
            while misses < 3:
                self.watch.wait(lambda: False, HEALTH_EVERY_S, None, give_up=False)
                misses = 0 if health(host, port) == 200 else misses + 1
        finally:
            file.unlink(missing_ok=True)
        raise CrashError(f"{url}/health did not answer 200 three times in a row; see {self.watch.log}")


def health(host: str, port: int) -> int | None:
    """Status of ``/health``; None where nothing answers within 2 s."""
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
