"""The network under load: an all-reduce over all ranks with torch, or a ring of plain sockets without it."""

import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from ..python_path import with_library
from ..training.nodes import NodeEnvironment
from . import exchange
from .findings import Finding

WORKER = "deepseek_sft.preflight.all_reduce_worker"
DEFAULT_MB = {"nccl": 1024.0, "gloo": 16.0, "sockets": 32.0}
LIMIT_S = 240.0


def over_sockets(hosts: list[str], rank: int, port: int, megabytes: float) -> tuple[Finding, dict[str, Any]]:
    """Send to the next node of a ring, all nodes at the same time.

    Returns:
        The finding (the floor is judged by the first node) and ``{"to", "gb_per_second"}``.
    """
    to = hosts[(rank + 1) % len(hosts)]
    payload = os.urandom(1 << 20) * max(1, round(megabytes * 1e6 / (1 << 20)))
    started = time.monotonic()
    try:
        answer = exchange.ask(to, port, {"ask": "data", "bytes": len(payload)}, payload, timeout=LIMIT_S)
    except OSError as error:
        return Finding("all_reduce", False, f"sending to {to} failed: {error}", "broken"), {}
    speed = len(payload) / 1e9 / (time.monotonic() - started)
    if answer != {"bytes": len(payload), "crc32": zlib.crc32(payload)}:
        return Finding("all_reduce", False, f"what was sent to {to} arrived changed", "corrupt"), {}
    detail = f"{speed:.2f} GB/s to {to} over a plain socket"
    return Finding("all_reduce", True, detail, f"{speed:.2f} GB/s"), {"to": to, "gb_per_second": speed}


def over_torch(
    node: NodeEnvironment, backend: str, port: int, megabytes: float, floor: float | None
) -> tuple[Finding, dict[str, Any]]:
    """All-reduce over all ranks, this node's ranks as processes of their own.

    Returns:
        The finding of this node and ``{"gb_per_second", "pairs": {peer node: GB/s}, "failed_at"}``; ``pairs`` only
        where the floor was missed.
    """
    environment = os.environ | {
        "MASTER_ADDR": node.main_host,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(node.world_size),
        "PYTHONPATH": with_library(os.environ),
        "OMP_NUM_THREADS": "1",
    }
    if backend == "gloo":
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        if node.nodes == 1:
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    words = [sys.executable, "-m", WORKER, "--backend", backend, "--megabytes", str(megabytes)]
    words += ["--ranks-per-node", str(node.ranks_per_node), *(["--floor", str(floor)] if floor else [])]
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, f"rank{local}") for local in range(node.ranks_per_node)]
        running = []
        for local, output in enumerate(outputs):
            rank = node.node_rank * node.ranks_per_node + local
            with open(output, "wb") as stream:
                running.append(
                    subprocess.Popen(
                        words,
                        env=environment | {"RANK": str(rank), "LOCAL_RANK": str(local)},
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        failed = _wait(running)
        if failed is None:
            return _read(outputs[0].read_text(errors="replace"), backend, megabytes)
        local, code = failed
        text = outputs[local].read_text(errors="replace").strip().splitlines()
    last = text[-1] if text else "no output"
    rank = node.node_rank * node.ranks_per_node + local
    what = f"did not end within {LIMIT_S:.0f} s" if code is None else f"ended with {code}"
    return Finding("all_reduce", False, f"rank {rank} {what}: {last}", "broken"), {"failed_at": time.time()}


def _wait(running: list[subprocess.Popen]) -> tuple[int, int | None] | None:
    """Local rank and exit code of the first process that failed (None: too slow); then all are ended."""
    deadline = time.monotonic() + LIMIT_S
    try:
        while True:
            codes = [process.poll() for process in running]
            bad = [(local, code) for local, code in enumerate(codes) if code]
            if bad:
                return bad[0]
            if all(code == 0 for code in codes):
                return None
            if time.monotonic() > deadline:
                return codes.index(None), None
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _read(text: str, backend: str, megabytes: float) -> tuple[Finding, dict[str, Any]]:
    facts = json.loads(text.strip().splitlines()[-1])
    speed = facts["gb_per_second"]
    if not facts["correct"]:
        return Finding("all_reduce", False, f"the sum of {backend}'s all-reduce is wrong", "wrong sum"), facts
    detail = f"{speed:.2f} GB/s bus bandwidth, {backend}, {megabytes:g} MB over {facts['ranks']} ranks"
    return Finding("all_reduce", True, detail, f"{speed:.2f} GB/s"), facts
