"""Promises of a run that goes on with other ranks: the same states, the same curve, and no damaged byte believed."""

import json
import subprocess
from pathlib import Path

import pytest
from training_inputs import SHAPE, make_inputs, probe_variables

STAGES = Path(__file__).resolve().parent
COMMON = {"max_grad_norm": 1e6, "weight_decay": 0.1, "balance_bias_speed": 0.001}
SHARDS = {"unbroken": 4, "two": 8, "four": 2, "three": 1}  # experts per shard
LEGS = [  # steps of 12 rows
    {"name": "unbroken", "ranks": 4, "from": None, "to": 6, "saved": [2], "sub_group_size": 60_000},
    {"name": "two", "ranks": 2, "from": "unbroken", "start": 2, "to": 4, "saved": [4]},
    {"name": "four", "ranks": 4, "from": "two", "start": 4, "to": 5, "saved": [5], "sub_group_size": 30_000},
    {
        "name": "three",
        "ranks": 3,
        "from": "four",
        "start": 5,
        "to": 6,
        "saved": [],
        "sub_group_size": 40_000,
        "flip": True,
    },
]
SETTINGS = {
    "unbroken": {"micro_batch_size": 3, "expert_parallel_size": 2},
    "two": {"micro_batch_size": 4, "gradient_accumulation_steps": 3, "sequence_parallel_size": 2}
    | {"strategy": "zero3_offload"},
    "four": {"micro_batch_size": 3, "expert_parallel_size": 4, "nodes": 2},
    "three": {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def legs(environment, project, tmp_path_factory):
    """Name → figures of each leg, all in one launch."""
    folder = tmp_path_factory.mktemp("legs")
    make_inputs(folder, 36, SHAPE, longest=24)
    python = environment("train")
    variables = probe_variables(project, python)
    told = [
        leg | {"settings": COMMON | {"experts_per_shard": SHARDS[leg["name"]]} | SETTINGS[leg["name"]]} for leg in LEGS
    ]
    (folder / "legs").write_text(json.dumps(told))
    probe = [str(STAGES / "other_topology_probe.py"), str(folder), str(folder / "legs"), str(folder)]
    done = subprocess.run([str(python), *probe], env=variables, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {leg["name"]: json.loads((folder / f"{leg['name']}.json").read_text()) for leg in LEGS}


@pytest.mark.parametrize(("leg", "before", "step"), [("two", "unbroken", 2), ("four", "two", 4), ("three", "four", 5)])
def test_states_are_the_same_bits_on_other_ranks_and_shards(legs, leg, before, step):
    assert legs[leg]["resumed"] == legs[before][f"states_{step}"]
    assert legs[leg]["biases_resumed"] == legs[before][f"biases_{step}"] != legs["unbroken"]["biases_resumed"]
    assert legs[leg]["counts"] == [step, False]


def test_each_step_has_the_loss_of_the_unbroken_run(legs):
    found = legs["two"]["losses"] + legs["four"]["losses"] + legs["three"]["losses"]
    assert found == pytest.approx(legs["unbroken"]["losses"][2:], rel=1e-5)


@pytest.mark.parametrize("leg", ["unbroken", "two", "four"])  # expert and sequence parallelism, offload, resumed
def test_a_checkpoint_written_beside_the_next_step_has_the_same_bytes(legs, leg):
    ranks = next(one["ranks"] for one in LEGS if one["name"] == leg)
    assert sum(name.endswith(".pt") for name in legs[leg]["same"]) == 2 * ranks
    assert all(legs[leg]["same"].values()), legs[leg]["same"]


@pytest.mark.parametrize("leg", ["two", "four"])
def test_a_stop_beside_a_save_ends_with_that_checkpoint_and_without_another_update(legs, leg):
    """Before the step: nothing is computed, the checkpoint is still written. Before its update: it is committed."""
    assert legs[leg]["stopped"] == [True, True, True, False]


def test_a_turned_bit_in_a_file_that_several_ranks_read_is_named_on_all_of_them(legs):
    problems = legs["three"]["problems"]
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt: the content of record" in problems[0][0]
    assert problems == [problems[0]] * 3 and len(problems[0]) == 1
