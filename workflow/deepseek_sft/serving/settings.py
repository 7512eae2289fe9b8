"""Settings of the serving stage, read from ``settings.json``.

The workflow writes that file from the validated config (section ``serve`` with ``smoke_test`` inside); it is checked
again here because the programs also run by hand.
"""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

from .. import json_files
from ..errors import BadInputError
from . import smoke_settings
from .smoke_settings import SmokeSettings

BACKENDS = ("native", "ray")
# Flags that follow from the allocation or from a setting of their own; engine_args must not contradict them.
DECIDED_FLAGS = {
    "nnodes": "the allocation's nodes",
    "node-rank": "the allocation's nodes",
    "master-addr": "the head node",
    "master-port": "a free port of the head node",
    "headless": "the node's role",
    "distributed-executor-backend": "serve.backend",
    "tensor-parallel-size": "serve.tensor_parallel_size",
    "pipeline-parallel-size": "serve.pipeline_parallel_size",
    "host": "serve.host",
    "port": "serve.port",
    "api-key": "serve.api_key_file",
    "max-model-len": "serve.max_model_len",
    "served-model-name": "serve.served_model_name",
    "reasoning-parser": "serve.reasoning_parser",
    "dtype": "serve.dtype",
    "trust-remote-code": "serve.trust_remote_code",
    "uds": "serve.host",
}
# The server is watched over plain HTTP; encryption belongs to a proxy in front of it, or to a tunnel.
UNSUPPORTED_FLAGS = ("ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "root-path")


@dataclasses.dataclass(frozen=True)
class ServeSettings:
    """Settings of a deployment; see ``config/README.md`` for each key's meaning.

    Attributes:
        engine_args: further flags of ``vllm serve`` without dashes: a value, true (bare flag), false (``--no-flag``),
            a mapping (JSON), a list (several values) or null (leave out).
        environment: variables of every serving process; they win over those set here.
        host: address to listen on; None chooses (see ``Node._api_address``). A smoke test always takes loopback.
        port: port of the API, 0 for a free one. A smoke test always takes a free one.
        secrets_file: file with further variables of the serving processes, see ``secrets_file``.
        api_key_file: file with the key that clients must send; None makes one. See ``api_keys``.
        network_interface: interface of the traffic between nodes; None takes the one that routes to the head.
        ready_timeout_s: deadline in seconds until ``/health`` answers.
        stop_grace_s: seconds between the request to stop and the kill.
    """

    backend: str = "native"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int = 32768
    served_model_name: str = "deepseek-r1-sft"
    reasoning_parser: str | None = "deepseek_r1"
    host: str | None = None
    port: int = 0
    dtype: str = "auto"
    trust_remote_code: bool = False
    engine_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    ready_timeout_s: float = 3600
    stop_grace_s: float = 30
    api_key_file: str | None = None
    secrets_file: str | None = None
    network_interface: str | None = None
    smoke_test: SmokeSettings = dataclasses.field(default_factory=SmokeSettings)

    @property
    def world_size(self) -> int:
        """Processes that hold a part of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def local_world_size(self, nodes: int) -> int:
        """Such processes per node.

        Raises:
            BadInputError: they cannot be spread evenly.
        """
        if self.world_size % nodes:
            raise BadInputError(
                f"serve: tensor_parallel_size {self.tensor_parallel_size} x pipeline_parallel_size "
                f"{self.pipeline_parallel_size} = {self.world_size} processes do not spread evenly over {nodes} nodes",
                "change these two, or `nodes` of the rule smoke_test in the profile, so that nodes divides the product",
            )
        return self.world_size // nodes


def read(path: Path) -> ServeSettings:
    """Read and check ``settings.json``.

    Raises:
        BadInputError: unreadable, an unknown key, a wrong type or an impossible value; names the file and the key.
    """
    try:
        value = json_files.load(path)
    except (OSError, ValueError) as error:
        raise BadInputError(f"settings {path} cannot be read: {error}") from None
    return parse(value, str(path))


def parse(value: Any, where: str = "settings") -> ServeSettings:
    """Turn the JSON value of a settings file into settings; see ``read``."""
    if not isinstance(value, dict):
        raise BadInputError(f"{where}: expected an object, found {type(value).__name__}")
    value = dict(value)
    smoke = value.pop("smoke_test", None) or {}
    smoke = _checked(SmokeSettings, smoke, f"{where}: smoke_test.")
    smoke = SmokeSettings(**{name: tuple(item) if isinstance(item, list) else item for name, item in smoke.items()})
    settings = ServeSettings(**_checked(ServeSettings, value, f"{where}: "), smoke_test=smoke)
    settings = dataclasses.replace(
        settings,
        environment={name: str(text) for name, text in settings.environment.items()},
        engine_args={name.lstrip("-").replace("_", "-"): flag for name, flag in settings.engine_args.items()},
    )
    _check_values(settings, where)
    return settings


def _check_values(settings: ServeSettings, where: str) -> None:
    if settings.backend not in BACKENDS:
        raise BadInputError(f"{where}: backend is {settings.backend!r}, expected one of {', '.join(BACKENDS)}")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "ready_timeout_s", "stop_grace_s"):
        if getattr(settings, name) <= 0:
            raise BadInputError(f"{where}: {name} is {getattr(settings, name)}, expected more than 0")
    if not 0 <= settings.port <= 65535:
        raise BadInputError(f"{where}: port is {settings.port}, expected 0 (a free one) to 65535")
    smoke_settings.check(settings.smoke_test, where)
    if "VLLM_API_KEY" in settings.environment:
        raise BadInputError(
            f"{where}: environment.VLLM_API_KEY would stand in the results for all to read",
            "put the key into a file of mode 0600 and set serve.api_key_file",
        )
    for flag in settings.engine_args:
        if flag in UNSUPPORTED_FLAGS:
            raise BadInputError(
                f"{where}: engine_args.{flag} is not supported",
                "serve plain HTTP and put a proxy or a tunnel before it",
            )
        if flag in DECIDED_FLAGS:
            raise BadInputError(
                f"{where}: engine_args.{flag} is decided by {DECIDED_FLAGS[flag]}", f"remove {flag} from engine_args"
            )


def _checked(kind: type, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInputError(f"{where.rstrip(': .')}: expected an object, found {type(value).__name__}")
    hints = typing.get_type_hints(kind)
    hints.pop("smoke_test", None)
    for key, entry in value.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise BadInputError(f"{where}{key} is unknown", f"did you mean {near[0]}?" if near else "")
        if not _is(entry, hints[key]):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise BadInputError(f"{where}{key} is {entry!r}, expected {expected}")
    return value


def _is(value: Any, hint: Any) -> bool:
    """Whether a JSON value has the annotated type; integers pass as floats, booleans pass as booleans only."""
    allowed = [typing.get_origin(part) or part for part in typing.get_args(hint) or (hint,)]
    if typing.get_origin(hint) in (dict, tuple):
        allowed = [{dict: dict, tuple: list}[typing.get_origin(hint)]]
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, tuple(allowed)) or (isinstance(value, int) and float in allowed)
