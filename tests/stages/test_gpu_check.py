"""The harness of `make gpu-check`, on a CPU, small: its checks pass here, and see planted faults. About 10 s."""

import json
import re
import subprocess

import pytest
from training_inputs import PROJECT

# In one process; `engine` and `ranks` are the training stage and DeepSpeed, which have tests of their own.
PROBE = """
import dataclasses, json, sys, tempfile
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import check
place = check.Place("cpu", True, Path(tempfile.mkdtemp(dir=sys.argv[2])))
found = {name: [dataclasses.asdict(row) for row in check.run_one(name, place)]
         for name in ("products", "attention", "layer", "loss", "tools")}
import products
right = products.expert_products._outer
def wrong(left, right_, counts):
    made = right(left, right_, counts)
    return made if counts.ends is None else made * 1.1
products.expert_products._outer = wrong
found["faulty products"] = [dataclasses.asdict(row) for row in check.run_one("products", place)]
import kernels, torch.nn.functional as F
plain = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda *tensors, scale, **more: plain(*tensors, scale=1.5 * scale, **more)
found["faulty attention"] = [dataclasses.asdict(row) for row in check.run_one("attention", place)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(environment, tmp_path_factory):
    command = [environment("train"), "-c", PROBE, PROJECT / "tests/gpu", tmp_path_factory.mktemp("gpu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["products", "attention", "layer", "loss", "tools"])
def test_nothing_fails_on_a_sound_machine(found, name):
    assert found[name] and not [row for row in found[name] if row["passed"] is False]


def test_grouped_products_were_compared_for_every_kind_of_counts(found):
    assert sum(row["passed"] is True for row in found["products"]) == 6


def test_wrong_products_and_a_wrong_scale_are_seen(found):
    assert any(row["passed"] is False for row in found["faulty products"])
    assert any(row["passed"] is False for row in found["faulty attention"])


def test_what_needs_a_gpu_is_not_passed_here(found):
    judged = {row["name"]: row["passed"] for row in found["tools"]}
    assert judged["nvidia-smi, as preflight reads it"] is None and judged["NVML: clocks, throttling, ECC"] is None
    assert next(row for row in found["layer"] if "memory" in row["name"])["passed"] is None


def test_without_a_gpu_it_ends_at_once_and_says_how_to_try_it(environment):
    command = [environment("train"), PROJECT / "tests/gpu/check.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "--device cpu --small" in done.stderr


def test_its_packages_have_the_versions_of_the_lock():
    def pins(path):
        return set(re.findall(r"^([\w.-]+==[^\s;\\]+)", (PROJECT / path).read_text(), re.MULTILINE))

    asked = pins("tests/gpu/requirements.txt")
    locked = [pins(f"envs/{name}.txt") for name in ("train", "train.no-deps", "workflow")]
    assert asked and asked <= set.union(*locked)
