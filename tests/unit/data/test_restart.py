"""The same bytes for any number of workers, and after a kill at any moment followed by the same command."""

import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
from unit.data.helpers import PROJECT, TOKENIZER, answer, assistant, called, run_script, tool, user, write_lines

from deepseek_sft import files

RECORDS = 4000


def records():
    for i in range(RECORDS):
        if i % 97 == 0:
            yield "{broken"
        elif i % 5 == 0:
            yield {"messages": [user(f"Q{i}"), called("f"), tool(str(i)), assistant(f"A{i}", reasoning="R")]}
        else:
            yield {"id": f"r{i}", "messages": [user(f"Q{i} " * 9), answer("R " * (i % 50 + 1), f"A{i}"), user("more")]}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("raw") / "chats.jsonl", records())


def commands(raw, folder, workers):
    prepare = [
        "prepare_data.py", "--source", raw, "--output", folder / "train.jsonl", "--rejects", folder / "rejects.jsonl",
        "--receipt", folder / "prepare.receipt", "--workers", workers, "--weights", "1.5",
    ]  # fmt: skip
    tokenize = [
        "tokenize_data.py", "--input", folder / "train.jsonl", "--tokenizer", TOKENIZER, "--max-length", 100,
        "--output", folder / "tokens", "--rejects", folder / "rejects2.jsonl", "--statistics", folder / "s.json",
        "--receipt", folder / "tokenize.receipt", "--workers", workers,
    ]  # fmt: skip
    return prepare, tokenize


def fingerprints(folder):
    names = ("train.jsonl", "rejects.jsonl", "tokens", "rejects2.jsonl", "s.json")
    return {name: files.fingerprint(folder / name) for name in names}


def run_all(raw, folder, workers):
    folder.mkdir(exist_ok=True)
    for command in commands(raw, folder, workers):
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
    return fingerprints(folder)


@pytest.fixture(scope="module")
def expected(raw, tmp_path_factory):
    return run_all(raw, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("workers", [2, 8])
def test_files_are_the_same_bytes_for_any_number_of_workers(raw, expected, tmp_path, workers):
    assert run_all(raw, tmp_path / "out", workers) == expected


def test_killed_run_leaves_nothing_half_written_and_the_same_command_gives_the_same_bytes(raw, expected, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    for number, command in enumerate(commands(raw, tmp_path, 2)):
        script = [sys.executable, PROJECT / "workflow" / "scripts" / command[0], *command[1:]]
        process = subprocess.Popen(list(map(str, script)), stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.2, 3))
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=30)
        assert not alive, f"workers outlived their parent (seed {seed})"
        for name, fingerprint in expected.items():
            if (tmp_path / name).exists() and (number == 1 or name in ("train.jsonl", "rejects.jsonl")):
                assert files.fingerprint(tmp_path / name) == fingerprint, f"half-written {name} (seed {seed})"
        assert run_script(*command).returncode == 0
    assert fingerprints(tmp_path) == expected, f"seed {seed}"
