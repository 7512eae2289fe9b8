"""Conversion at its full size and in bad circumstances: 671B over 256 ranks, 1,024 ranks, kills at any moment."""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import time

import large_zero3
import pytest
import small_models

from deepseek_sft.convert import tiny_model

GIB = 1 << 30
MEDIUM = tiny_model.TinyShape(hidden_size=256, layers=4, routed_experts=32, moe_intermediate_size=192, vocab_size=4000)


def arguments(inputs, folder):
    return [
        *(f"--checkpoint={inputs / 'step'}", f"--base={inputs / 'base'}"),
        *(f"--output={folder / 'model'}", f"--receipt={folder / 'receipt.json'}"),
    ]


@pytest.fixture
def script(project):
    return [sys.executable, str(project / "workflow/scripts/convert_checkpoint.py")]


# Runs the command given and prints the peak of its resident memory, in kilobytes, last.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


SPREADS = {1: 8, 64: 4}  # ranks over which experts are spread → experts of a shard
if "FULL_SIZES" in os.environ:
    SPREADS |= {8: 16}


@pytest.mark.parametrize(("parallel", "experts_per_shard"), SPREADS.items())
def test_full_size_checkpoint_is_planned_within_a_gibibyte(tmp_path, script, parallel, experts_per_shard):
    specs = large_zero3.write_base(tmp_path / "base", small_models.FULL_SIZE)
    assert len(specs) == 45_395
    spread = {"experts_per_shard": experts_per_shard, "expert_parallel_size": parallel}
    fp32 = large_zero3.write_checkpoint(tmp_path / "step", specs, world_size=256, filled=False, **spread)
    assert fp32 == 4 * 671_026_404_352  # biases are buffers
    command = [*script, *arguments(tmp_path, tmp_path), "--dry-run", "--nodes=4"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True, check=True)
    *lines, peak = done.stdout.splitlines()
    plan = json.loads("\n".join(lines))
    assert int(peak) * 1024 < GIB
    assert (plan["tensors"], plan["parameters"], plan["world_size"]) == (45_395, 671_026_419_200, 256)
    assert 1.342e12 < plan["bytes_to_write"] < 1.343e12 and len(plan["shards"]) == 270
    assert max(plan["bytes_of_each_share"]) - min(plan["bytes_of_each_share"]) < 2 * 5.1e9
    shortest, longest = plan["seconds"]
    assert 0 < shortest < longest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "step"]


def test_thousand_ranks_convert_with_few_descriptors(tmp_path, script):
    specs = large_zero3.write_base(tmp_path / "base", small_models.SHAPE)
    large_zero3.write_checkpoint(tmp_path / "step", specs, world_size=1024, experts_per_shard=2)

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    subprocess.run([*script, *arguments(tmp_path, tmp_path)], preexec_fn=few, check=True, capture_output=True)
    assert (
        json.loads((tmp_path / "receipt.json").read_text())["figures"]["records_checked"] == 1024 + 2
    )  # router biases


def digests(folder):
    paths = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kill_after(process, incomplete, finished_files):
    """Kill a conversion once it has finished so many files; whether that came before its end."""
    while process.poll() is None:
        if len(list(incomplete.glob("*.safetensors"))) >= finished_files:
            process.kill()
        time.sleep(0.002)
    return process.returncode != 0


def test_kills_at_twenty_random_moments_end_in_the_same_files(tmp_path, script):
    specs = large_zero3.write_base(tmp_path / "base", MEDIUM)
    large_zero3.write_checkpoint(tmp_path / "step", specs, world_size=4, sub_group_size=10**6)
    (tmp_path / "whole").mkdir()
    options = ["--max-shard-size=2MB", "--workers=2"]
    subprocess.run([*script, *arguments(tmp_path, tmp_path / "whole"), *options], check=True, capture_output=True)
    expected = digests(tmp_path / "whole/model")
    assert len(expected) > 20

    chance, interrupted, in_the_middle = random.Random(1), 0, 0
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command = [*script, *arguments(tmp_path, folder), *options]
        killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        incomplete = folder / "model.incomplete"
        interrupted += kill_after(killed, incomplete, chance.randrange(len(expected) // 2))
        present = (
            {n: d for n, d in digests(incomplete).items() if n.endswith(".safetensors")} if incomplete.exists() else {}
        )
        assert present.items() <= expected.items()  # whatever has a final name is whole
        in_the_middle += len(present) > 0
        if not (folder / "receipt.json").exists():
            subprocess.run(command, check=True, capture_output=True)
        assert digests(folder / "model") == expected
        left = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        assert sorted(left) == ["model", "receipt.json"]
    assert interrupted >= 10 and in_the_middle >= 3, "the kills came too late or too early to show anything"
