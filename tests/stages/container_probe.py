"""What a program in a container learns of its job: written to $PROBE/<node rank>.json. Takes over a dead job's lock."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from deepseek_sft.slurm import nodes
from deepseek_sft.training import lock

place = nodes.detect("cpu", 2)
folder = Path(os.environ["PROBE"])
found = {
    "hosts": place.hosts,
    "main_host": place.main_host,
    "programs": [name for name in ("squeue", "scontrol", "srun", "munge") if shutil.which(name)],
    "hidden": [path for path in os.environ["HIDDEN"].split(":") if Path(path).exists()],
    "setting": os.environ["SETTING"],
    "directory": str(Path.cwd()),
}
if place.node_rank == 0:
    with lock.hold(folder / "runs/dead"), socket.create_server((place.main_host, place.main_port)) as server:
        server.settimeout(60)
        link, _ = server.accept()
        found["heard"] = link.recv(100).decode()
else:
    for _ in range(300):
        try:
            link = socket.create_connection((place.main_host, place.main_port), timeout=0.1)
        except OSError:
            time.sleep(0.1)
            continue
        link.send(nodes.own_name().encode())
        break
Path("/written-to-the-image").touch()
(folder / f"{place.node_rank}.json").write_text(json.dumps(found))
sys.exit(0)
