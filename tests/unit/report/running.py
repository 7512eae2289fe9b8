"""An experiment that is going, as its stages leave it meanwhile, with its page; squeue answers what a test says."""

import http.client
import json
import os
import threading
import time
from pathlib import Path

from unit.report import results as made

from deepseek_sft.report import live, live_server, status

BEFORE_TRAIN = ("prepare_data", "tokenize_data", "plan", "prepare_model")
GIB = 1 << 30
PATIENCE_S = 60


class Site:
    """A project folder with one experiment, and a squeue that answers what the test says."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.monkeypatch = root, monkeypatch
        self.results, self.logs = root / "results" / "demo", root / "logs" / "demo"
        self.logs.mkdir(parents=True)
        self.run = self.results / "train/runs/3f9c01d2ab45"

    def squeue(self, *rows: str, code: int = 0) -> None:
        folder = self.root / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "rows").write_text("".join(f"{row}|{self.root}\n" for row in rows))
        (folder / "squeue").write_text(f'#!/bin/sh\ncat "{folder}/rows"\nexit {code}\n')
        (folder / "squeue").chmod(0o755)
        self.monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def no_squeue(self) -> None:
        (self.root / "empty").mkdir()
        self.monkeypatch.setenv("PATH", str(self.root / "empty"))

    def log(self, rule: str, owner: str, text: str, age: float = 1.0) -> Path:
        """Log of a stage as workflow/scripts/stage.sh makes it, last written ``age`` seconds ago."""
        (self.logs / rule).mkdir(exist_ok=True)
        path = self.logs / rule / f"{owner}-1.log"
        path.write_text(text)
        link = self.logs / f"{rule}.log"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{rule}/{path.name}")
        os.utime(path, (time.time() - age, time.time() - age))
        return path

    def training(self, steps: int, total: int, saved: int | None = 25) -> None:
        """A run folder after ``steps`` steps, with a checkpoint of one GiB and one being written."""
        made.write_results(self.root, BEFORE_TRAIN)
        settings = {"schedule": {"steps": total}, "settings": {"max_hours": None}}
        (self.run / "settings.json").write_text(json.dumps(settings))
        (self.run / "metrics.jsonl").write_text("".join(json.dumps(made.line(n)) + "\n" for n in range(1, steps + 1)))
        if saved:
            (self.run / f"step_{saved}").mkdir()
            marker = {"step": saved, "files": {"a.pt": GIB // 2, "b.pt": GIB // 2}}
            (self.run / f"step_{saved}" / "committed.json").write_text(json.dumps(marker))
            (self.run / f"step_{2 * saved}").mkdir()

    def screen(self) -> dict[str, str]:
        """Rows of the screen by name; continued ones are joined."""
        rows, name = {}, ""
        for line in status.screen(self.results, self.logs).splitlines():
            name = line[:12].strip() or name
            rows[name] = f"{rows.get(name, '')} {line[12:]}".strip()
        return rows


class Served:
    """A page served for a test."""

    def __init__(self, make, every: float = live.EVERY_S, port: int = 0):
        self.refreshing = live.Refreshing(make, every)
        self.server = live_server.Server(port, self.refreshing, "demo")
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.port = self.server.server_address[1]

    def get(self, path: str = "", method: str = "GET", token: bool = True, **headers: str):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request(method, f"/{self.server.token}/{path}" if token else path, headers=headers)
        answer = connection.getresponse()
        answer.content = answer.read()
        connection.close()
        return answer

    def end(self):
        self.refreshing.end(PATIENCE_S)
        self.server.shutdown()
        self.server.server_close()
