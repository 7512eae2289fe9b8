"""A lasting deployment as its clients and its owner see it: the Slurm job, and the endpoint once it answers."""

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

from .. import files, json_files

ENDPOINT = "endpoint.json"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a lasting deployment is reached.

    Attributes:
        url: base URL of the API, ending in /v1.
        model: name it serves the model under.
        nodes: names of the nodes, the head first.
        api_key_file: file that holds the key; the key itself is nowhere else.
        stop: command that ends it.
    """

    url: str
    model: str
    nodes: list[str]
    api_key_file: str
    stop: str

    def curl(self) -> str:
        """A ready request for bash; the key goes through a pipe, as command lines can be seen by everyone."""
        body = {"model": self.model, "messages": [{"role": "user", "content": "What is 2 + 3?"}]}
        key = shlex.quote(self.api_key_file)
        return (
            f"curl {self.url}/chat/completions -H 'Content-Type: application/json' "
            f"-H @<(printf 'Authorization: Bearer %s' \"$(cat {key})\") -d {shlex.quote(json.dumps(body))}"
        )

    def text(self) -> str:
        """What its owner needs to know."""
        return "\n".join(
            [
                f"URL    {self.url}",
                f"model  {self.model}",
                f"nodes  {', '.join(self.nodes)}",
                f"key    in {self.api_key_file}",
                f"try    {self.curl()}",
                f"stop   {self.stop}",
            ]
        )

    def write(self, path: Path) -> None:
        """Write it with the ready request, atomically."""
        files.write_json(path, dataclasses.asdict(self) | {"curl": self.curl()})

    @classmethod
    def read(cls, path: Path) -> "Endpoint | None":
        """Read it; None while there is none, or none that this version understands."""
        try:
            value = json_files.load(path)
            json_files.require(value, {"url": str, "model": str, "nodes": list, "api_key_file": str, "stop": str})
        except (OSError, ValueError):
            return None
        return cls(**{field.name: value[field.name] for field in dataclasses.fields(cls)})


def who_serves(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Node → address, interface, processes (``name pid``), in the order of ranks, as the nodes wrote them."""
    nodes = sorted(filter(None, map(_node, run_dir.glob("*.json"))), key=lambda entry: entry["rank"])
    return {
        entry["node"]: {
            "address": entry["address"],
            "interface": entry["interface"],
            "processes": [f"{process['name']} {process['pid']}" for process in entry["processes"]],
        }
        for entry in nodes
    }


def _node(path: Path) -> dict[str, Any] | None:
    """What a node wrote of itself; None of other files, and of those that cannot be read."""
    try:
        entry = json_files.load(path)
        json_files.require(entry, {"node": str, "address": str, "interface": str, "rank": int, "processes": list})
        for process in entry["processes"]:
            json_files.require({"process": process}, {"process": {"name": str, "pid": int}})
    except (OSError, json_files.NotJsonError):
        return None
    return entry


def how_to_stop(run_dir: Path) -> str:
    """Command that ends the deployment of this process."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"scancel {job}" if job else f"touch {shlex.quote(str(run_dir / 'stop'))}"
