"""Devices and network under load: products, copies and all-reduces of all ranks, or a ring of plain sockets."""

import os
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from .. import json_files, time_limits
from ..python_path import with_library
from ..slurm.nodes import NodeEnvironment, gloo_interface
from . import exchange
from .findings import Finding

WORKER = "deepseek_sft.preflight.all_reduce_worker"
DEFAULT_MB = {"nccl": 1024.0, "gloo": 16.0, "sockets": 32.0}
MEASURES = ("gemm", "memory_bandwidth", "nvlink", "all_reduce")  # in their order
SOCKETS_S = 240.0  # for plain sockets, which need no torch


def over_sockets(hosts: list[str], rank: int, port: int, megabytes: float) -> tuple[Finding, dict[str, Any]]:
    """Send to the next node of a ring, all nodes at the same time.

    Returns:
        The finding (the floor is judged by the first node) and ``{"to", "gb_per_second"}``.
    """
    to = hosts[(rank + 1) % len(hosts)]
    payload = os.urandom(1 << 20) * max(1, round(megabytes * 1e6 / (1 << 20)))
    started = time.monotonic()
    try:
        answer = exchange.ask(to, port, {"ask": "data", "bytes": len(payload)}, payload, timeout=SOCKETS_S)
    except OSError as error:
        return Finding("all_reduce", False, f"sending to {to} failed: {error}", "broken"), {}
    speed = len(payload) / 1e9 / (time.monotonic() - started)
    if answer != {"bytes": len(payload), "crc32": zlib.crc32(payload)}:
        return Finding("all_reduce", False, f"what was sent to {to} arrived changed", "corrupt"), {}
    detail = f"{speed:.2f} GB/s to {to} over a plain socket"
    return Finding("all_reduce", True, detail, f"{speed:.2f} GB/s"), {"to": to, "gb_per_second": speed}


def over_torch(
    node: NodeEnvironment, backend: str, port: int, megabytes: float, floor: float | None, measures: tuple[str, ...]
) -> tuple[list[Finding], dict[str, Any]]:
    """What all ranks measure together, this node's ranks as processes of their own.

    Args:
        measures: of ``MEASURES``.

    Returns:
        The findings of this node and ``{"gb_per_second", "pairs": {peer node: GB/s}, "gemm_tflops": [of each rank],
        "memory_gb_per_second", "nvlink_gb_per_second", "failed_at"}``; ``pairs`` only where the floor was missed.
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
        if interface := gloo_interface(node.nodes, environment):
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    limit = time_limits.under_load(node.world_size)
    words = [sys.executable, "-m", WORKER, "--backend", backend, "--megabytes", str(megabytes)]
    words += ["--ranks-per-node", str(node.ranks_per_node), *(["--floor", str(floor)] if floor else [])]
    words += ["--join-seconds", str(limit.joining), "--seconds", str(limit.measuring)]
    words += ["--measure", *measures]
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
        failed = _wait(running, outputs, limit)
        if failed is None:
            told = [json_files.parse(output.read_text(errors="replace").strip().splitlines()[-1]) for output in outputs]
            return _read(told, backend, megabytes)
        local, what = failed
        text = [line for line in outputs[local].read_text(errors="replace").splitlines() if line.strip()]
    last = text[-1] if text else "no output"
    rank = node.node_rank * node.ranks_per_node + local
    return [Finding("all_reduce", False, f"rank {rank} {what}: {last}", "broken")], {"failed_at": time.time()}


def _wait(running: list[subprocess.Popen], outputs: list[Path], limit: time_limits.UnderLoad) -> tuple[int, str] | None:
    """Local rank of the first process that failed, and how; then all are ended.

    The limit of each stage begins when the last of this node's ranks has come to it: imports are not measured.
    """
    stages = [
        ('"loaded"', limit.loading, "did not import torch"),
        ('"joined"', limit.joining, "did not meet all other ranks"),
        (None, limit.measuring, "did not end"),
    ]
    stage, since = 0, time.monotonic()
    try:
        while True:
            codes = [process.poll() for process in running]
            bad = [(local, code) for local, code in enumerate(codes) if code]
            if bad:
                return bad[0][0], f"ended with {bad[0][1]}"
            if all(code == 0 for code in codes):
                return None
            mark, seconds, what = stages[stage]
            behind = [i for i, output in enumerate(outputs) if mark and mark.encode() not in output.read_bytes()]
            if mark and not behind:
                stage, since = stage + 1, time.monotonic()
            elif time.monotonic() - since > seconds:
                late = behind[0] if behind else codes.index(None)
                return late, f"{what} within {seconds:.0f} s"
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()


def _read(told: list[dict[str, Any]], backend: str, megabytes: float) -> tuple[list[Finding], dict[str, Any]]:
    """Findings and facts of a node from what its ranks measured."""
    facts, findings = dict(told[0]), []
    if "gemm_tflops" in facts:
        rates = facts["gemm_tflops"] = [one["gemm_tflops"] for one in told]
        shown = f"{_figure(min(rates))} to {_figure(max(rates))} TFLOP/s"
        findings.append(Finding("gemm", True, f"{len(rates)} devices, {shown}", f"{_figure(min(rates))} TFLOP/s"))
    if "memory_gb_per_second" in facts:
        speed = facts["memory_gb_per_second"] = sum(one["memory_gb_per_second"] for one in told)
        text = f"{speed:.1f} GB/s of copies in host memory, all ranks together"
        findings.append(Finding("memory_bandwidth", True, text, f"{speed:.1f} GB/s"))
    if "nvlink_gb_per_second" in facts:
        speed = facts["nvlink_gb_per_second"]
        text = f"{speed:.2f} GB/s bus bandwidth inside the node, {backend}, {megabytes:g} MB"
        findings.append(Finding("nvlink", True, text, f"{speed:.2f} GB/s"))
    if "gb_per_second" not in facts:
        return findings, facts
    speed = facts["gb_per_second"]
    if not facts["correct"]:
        return [
            *findings,
            Finding("all_reduce", False, f"the sum of {backend}'s all-reduce is wrong", "wrong sum"),
        ], facts
    detail = f"{speed:.2f} GB/s bus bandwidth, {backend}, {megabytes:g} MB over {facts['ranks']} ranks"
    return [*findings, Finding("all_reduce", True, detail, f"{speed:.2f} GB/s")], facts


def _figure(value: float) -> str:
    return f"{value:.3g}"
