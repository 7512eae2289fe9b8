"""A stand-in for torchrun: starts a process for each rank, which reports the variables that it was given.

The command line is the one that train.py gives to the real torchrun, and so are the variables of the ranks. Reports go
to ``<run folder>/ranks/<node>.txt``, a line for each rank. Rank 0 then says that training was asked to stop and saved.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEADLINE = 200.0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError("the other nodes have not reported")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("nnodes", "node-rank", "nproc-per-node", "master-port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("master-addr", "run-folder", "attempt"):
        parser.add_argument(f"--{name}", required=True)
    options, _ = parser.parse_known_args(words)
    folder = Path(options.run_folder)
    reports = folder / "ranks"
    reports.mkdir(exist_ok=True)
    line = " ".join(f"{name}=${name}" for name in VARIABLES)
    ranks = []
    report = reports / f"{socket.gethostname()}.txt"
    with open(report.with_suffix(".tmp"), "w") as stream:
        for local in range(options.nproc_per_node):
            variables = {
                "RANK": options.node_rank * options.nproc_per_node + local,
                "LOCAL_RANK": local,
                "WORLD_SIZE": options.nnodes * options.nproc_per_node,
                "LOCAL_WORLD_SIZE": options.nproc_per_node,
                "MASTER_ADDR": options.master_addr,
                "MASTER_PORT": options.master_port,
            }
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            command = ["sh", "-c", f'echo "$(hostname) {line}"']
            ranks.append(subprocess.Popen(command, env=environment, stdout=stream))
        codes = [rank.wait() for rank in ranks]
    assert codes == [0] * options.nproc_per_node, codes
    report.with_suffix(".tmp").replace(report)
    # As real ranks do, all nodes end together: Slurm ends the others when one has left.
    if options.node_rank == 0:
        wait_for(lambda: len(list(reports.glob("*.txt"))) == options.nnodes)
        status = {"attempt": options.attempt, "outcome": "stopped", "message": "the stand-in has reported", "fix": ""}
        temporary = folder / "status.tmp"
        temporary.write_text(json.dumps(status | {"figures": {}}))
        temporary.replace(folder / "status.json")
    wait_for(lambda: options.attempt in (folder / "status.json").read_text())
