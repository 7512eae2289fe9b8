"""Which options the installed vLLM has: what was renamed, removed or added is decided here.

Facts from the published wheels; tests/fixtures/vllm_options holds each version's options. Answers differ too: the
reasoning field was ``reasoning_content``, since 0.12 it is ``reasoning``; evaluation/api.py reads either.
"""

import importlib.metadata
import re
from typing import Any

from ..errors import BadInputError

Version = tuple[int, ...]

PARSER_IMPLIES_REASONING = (0, 9)  # --enable-reasoning is needed before, deprecated here, gone in 0.10
ENABLE_LOG_REQUESTS = (0, 10, 1)  # --enable-log-requests replaces --disable-log-requests; silence is the new default
NATIVE_NODES = (0, 11, 1)  # --nnodes, --node-rank, --master-addr, --master-port
# Read in 0.32's source; 0.12 lacks the first, and 0.13 to 0.31 were not looked at.
DISTRIBUTED_TIMEOUT = (0, 32)  # --distributed-timeout-seconds, --cpu-distributed-timeout-seconds
REPLICAS_OVER_NODES = (0, 32)  # each node's share of --data-parallel-size follows from --nnodes


def installed() -> Version | None:
    """Installed release of vLLM as numbers, None where it is not installed or names none."""
    try:
        text = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
    return parse(text)


def parse(text: str) -> Version | None:
    """Numbers of a version such as ``0.11.1rc2+cpu``; None for one without, or for a development build (0.1.dev…).

    vLLM's builds from an untagged checkout call themselves 0.1.dev: they are current, not old.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    if not match or text.startswith("0.1.dev"):
        return None
    return tuple(int(number) for number in match.group().split("."))


def adapt(flags: dict[str, Any], version: Version | None) -> dict[str, Any]:
    """The flags as the installed vLLM knows them.

    Args:
        flags: as the current vLLM names them, or as users copied them from guides for older ones.
        version: None means current.

    Raises:
        BadInputError: it cannot do what the flags ask for.
    """
    flags = dict(flags)
    _adapt_reasoning(flags, version)
    _adapt_request_log(flags, version)
    if flags.get("nnodes") and not _has(NATIVE_NODES, version):
        raise BadInputError(
            f"vLLM {_text(version)} has no multi-node mode of its own (it came with {_text(NATIVE_NODES)})",
            "set serve.backend: ray, or install a newer vLLM",
        )
    if flags.get("nnodes") and flags.get("data-parallel-size") and not _has(REPLICAS_OVER_NODES, version):
        raise BadInputError(
            f"vLLM {_text(version)} does not place data-parallel replicas over nodes by itself, as "
            f"{_text(REPLICAS_OVER_NODES)} does",
            "set serve.data_parallel_size: 1, or install a newer vLLM",
        )
    if not _has(DISTRIBUTED_TIMEOUT, version):
        for name in ("distributed-timeout-seconds", "cpu-distributed-timeout-seconds"):
            flags.pop(name, None)
    return flags


def _adapt_reasoning(flags: dict[str, Any], version: Version | None) -> None:
    flags.pop("enable-reasoning", None)
    if flags.get("reasoning-parser") and not _has(PARSER_IMPLIES_REASONING, version):
        flags["enable-reasoning"] = True


def _adapt_request_log(flags: dict[str, Any], version: Version | None) -> None:
    wanted = flags.pop("enable-log-requests", None)
    unwanted = flags.pop("disable-log-requests", None)
    if wanted is None and unwanted is None:
        return
    logged = bool(wanted) if wanted is not None else not unwanted
    if _has(ENABLE_LOG_REQUESTS, version):
        flags["enable-log-requests"] = logged
    elif not logged:
        flags["disable-log-requests"] = True


def _has(since: Version, version: Version | None) -> bool:
    return version is None or version >= since


def _text(version: Version | None) -> str:
    return ".".join(map(str, version or ()))
