"""Inputs of training runs in tests: a small base model, a few rows of tokens, their receipts; and a way to start."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from training_helpers import write_settings

from deepseek_sft import receipts
from deepseek_sft.convert import base_sums, tiny_model
from deepseek_sft.data import tokens
from deepseek_sft.tensors import torch_pickle

PROJECT = Path(__file__).resolve().parents[1]
VOCABULARY = 1024
DEADLINE = 240.0


SHAPE = tiny_model.TinyShape(vocab_size=VOCABULARY, kv_lora_rank=64)


def probe_variables(project: Path, python: Path) -> dict[str, str]:
    """The environment of a program of tests that runs ranks by the train environment's ``python``."""
    return os.environ | {
        "PYTHONPATH": f"{project / 'workflow'}:{project / 'tests'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }


def make_inputs(folder: Path, rows: int = 30, shape: tiny_model.TinyShape = SHAPE, longest: int = 40) -> Path:
    """Write base, tokens and their receipts below ``folder``."""
    tiny_model.write_tiny(folder / "base", shape, 0, 8_000_000)
    _write_rows(folder / "tokens", np.random.default_rng(0), rows, shape, longest)
    _write_rows(folder / "held_out_tokens", np.random.default_rng(1), 5, shape, longest)
    for rule, name, result in (("prepare_model", "base", "base"), ("tokenize_data", "tokens", "tokens")):
        place = {result: str(folder / name)}
        if rule == "prepare_model":
            place["sums"] = str(folder / base_sums.NAME)
            base_sums.write(folder / base_sums.NAME, folder / "base", sorted((folder / "base").glob("*.safetensors")))
        else:
            place["held_out_tokens"] = str(folder / "held_out_tokens")
        receipts.write(folder / f"{rule}.json", rule, inputs={}, settings={}, result=place, figures={})
    return folder


def _write_rows(
    target: Path, random: np.random.Generator, rows: int, shape: tiny_model.TinyShape, longest: int
) -> None:
    target.mkdir()
    writer = tokens.TokenWriter(target)
    lengths = [int(random.integers(6, longest)) for _ in range(rows)]
    for number, length in enumerate(lengths):
        # Few values, so that there is something to learn; prompts of uneven length carry no loss.
        ids = random.integers(2, 60, length).astype(np.int32)
        labels = ids.copy()
        labels[: 1 + int(random.integers(0, length - 2))] = -100
        writer.add(f"row-{number}", ids, labels, np.array([length], np.int32))
    shards = writer.close()
    statistics = {"rows": rows, "samples": rows, "tokens": sum(lengths), "longest": max(lengths)}
    tokens.write_index(target, {"shards": shards, "vocab_size": shape.vocab_size} | statistics)


def tensors_of(folder: Path) -> list[Any]:
    """Names, sizes and checksums of all tensors of a checkpoint."""
    files = sorted(folder.glob("*_states.pt"))
    return [part for file in files for part in torch_pickle.open_archive(file).directory if "/data/" in part[0]]


class Trainer:
    """Starts train.py on one set of inputs, with settings changed, each run in a folder of its own."""

    def __init__(self, python: Path, inputs: Path, work: Path):
        self.python, self.inputs, self.work = python, inputs, work

    def command(self, ranks: int, **settings: Any) -> list[str]:
        self.work.mkdir(parents=True, exist_ok=True)
        file = write_settings(self.work / "settings.json", **settings)
        return [
            *(str(self.python), str(PROJECT / "workflow/scripts/train.py"), "--accelerator", "cpu"),
            *("--base-receipt", str(self.inputs / "prepare_model.json"), "--settings", str(file)),
            *("--tokens-receipt", str(self.inputs / "tokenize_data.json"), "--output", str(self.work / "train")),
            *("--receipt", str(self.receipt_file), "--ranks-per-node", str(ranks)),
        ]

    def start(self, ranks: int, *more: str, environment: dict[str, str] | None = None, **settings: Any):
        """Start train.py and return its process; standard error goes to a file."""
        command = [*self.command(ranks, **settings), *more]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.log = self.work / f"start-{time.monotonic_ns()}.log"
        with open(self.log, "w") as log:
            return subprocess.Popen(command, stderr=log, stdout=log, env=variables | (environment or {}))

    def run(self, ranks: int, *more: str, expected: int = 0, **settings: Any) -> str:
        """Run train.py to its end, check its exit code and return what it printed."""
        process = self.start(ranks, *more, **settings)
        return self.finish(process, expected)

    def finish(self, process: subprocess.Popen, expected: int) -> str:
        code = process.wait(DEADLINE)
        text = self.log.read_text()
        assert code == expected, f"exit code {code} instead of {expected}\n{text}"
        return text

    @property
    def receipt_file(self) -> Path:
        return self.work / "train.receipt.json"

    @property
    def receipt(self) -> dict[str, Any]:
        return json.loads(self.receipt_file.read_text())

    @property
    def run_folder(self) -> Path:
        """The folder of the only run."""
        (folder,) = (self.work / "train" / "runs").iterdir()
        return folder

    def metrics(self) -> list[dict[str, Any]]:
        file = self.run_folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics()]

    def steps_done(self) -> int:
        files = list((self.work / "train" / "runs").glob("*/metrics.jsonl"))
        return len(files[0].read_text().splitlines()) if files else 0

    def wait_for(self, process: subprocess.Popen, condition: Callable[[], bool]) -> None:
        """Wait until ``condition`` while the process runs."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert process.poll() is None, f"ended with {process.returncode}\n{self.log.read_text()}"
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes below a started train.py, in the order of their ranks."""
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [c for c in children if "xtuner_engine.worker" in " ".join(c.cmdline()) and "--nnodes" not in c.cmdline()]
    return sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))
