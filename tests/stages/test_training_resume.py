"""Resuming: from checkpoints of earlier versions, and never from damaged or foreign ones."""

import dataclasses
import hashlib
import json
import shutil
import subprocess

import pytest
import stored_checkpoint as stored
from training_inputs import PROJECT, Trainer, make_inputs, tensors_of

from deepseek_sft.tensors import torch_pickle
from deepseek_sft.training import checkpoints

SAVED_OFTEN = stored.SETTINGS | {"save_every_steps": 1, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return stored.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def resumed(environment, inputs, tmp_path_factory):
    """A run that went on from the stored checkpoint: its trainer."""
    trainer = Trainer(environment("train"), inputs, tmp_path_factory.mktemp("resumed"))
    stored.place(trainer.work)
    trainer.said = trainer.run(stored.RANKS, **SAVED_OFTEN)
    return trainer


def test_a_checkpoint_of_the_first_format_goes_on_as_it_was_begun(resumed):
    assert "resumed from step_3" in resumed.said and "records are right" in resumed.said
    assert resumed.losses() == pytest.approx(stored.EXPECTED["losses"], rel=1e-6)
    assert resumed.receipt["figures"]["resumed_from_step"] == 3


def test_a_checkpoint_has_the_keys_that_it_had_under_xtuners_own_runner(resumed):
    """Also of the client state, which earlier versions resume from; the stored one was written under that runner."""
    file = "zero_pp_rank_0_mp_rank_00_model_states.pt"
    folders = (stored.STORED / f"step_{stored.STEP}", resumed.run_folder / "step_6")
    before, now = (torch_pickle.load(torch_pickle.open_archive(folder / file)) for folder in folders)
    for part in ("meta", "message_hub", "optim_wrapper"):
        assert now[part].keys() == before[part].keys()
    assert before.keys() - now.keys() == {"sparse_tensor_module_names"}, "of DeepSpeed up to 0.18, read by nothing"
    assert now.keys() - before.keys() == {"checkpoint_parallel_dimensions"}, "of DeepSpeed 0.19"
    assert (before["meta"]["iter"], now["meta"]["iter"]) == (stored.STEP, 6)


@pytest.fixture(scope="module")
def on_four(environment, inputs, tmp_path_factory):
    """A run that went on from the stored checkpoint of two ranks on four, the weights of its base hidden."""
    trainer = Trainer(environment("train"), inputs, tmp_path_factory.mktemp("four"))
    stored.place(trainer.work)
    aside = [(path, path.with_suffix(".aside")) for path in (inputs / "base").glob("*.safetensors")]
    for path, hidden in aside:
        path.rename(hidden)
    try:
        trainer.said = trainer.run(4, **stored.SETTINGS, on_new_topology="continue")
    finally:
        for path, hidden in aside:
            hidden.rename(path)
    return trainer


def test_the_base_is_not_read_when_a_checkpoint_is_there(on_four):
    """Its weights are gone here, its configuration is not."""
    assert on_four.steps_done() == 2


def test_a_checkpoint_of_the_first_format_goes_on_with_twice_the_ranks(on_four):
    """Two ranks have trained three of six steps of 4 rows; the twelve rows that are left are two steps of 8."""
    assert "resumed from step_3, which 2 ranks wrote, on 4" in on_four.said and "records are right" in on_four.said
    assert "begun as 6 steps of 4 rows, 12 rows are done in 3 steps" in on_four.said
    assert [line["step"] for line in on_four.metrics()] == [4, 5]
    assert on_four.losses()[0] == pytest.approx(sum(stored.EXPECTED["losses"][:2]) / 2, rel=0.05), "the same 8 rows"
    marker = json.loads((on_four.run_folder / "step_5" / "committed.json").read_text())
    assert marker["schedule"] == {"rows_done": 28, "global_batch": 8, "planned_batch": 4, "planned_steps": 6}
    assert (marker["world_size"], marker["steps"]) == (4, 5)


def test_a_base_with_a_turned_bit_is_not_trained(environment, inputs, tmp_path):
    trainer = Trainer(environment("train"), inputs, tmp_path)
    (weights,) = (inputs / "base").glob("*.safetensors")
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
    try:
        said = trainer.run(stored.RANKS, expected=2, **stored.SETTINGS)
    finally:
        weights.write_bytes(sound)
    assert f"{weights.name} is damaged: its sha256 is not the one that prepare_model wrote down" in said
    assert not (trainer.run_folder / "metrics.jsonl").exists()


def test_a_checkpoint_of_the_first_format_is_converted_as_before(inputs, environment, tmp_path):
    script = PROJECT / "workflow/scripts/convert_checkpoint.py"
    command = [
        *(str(environment("workflow")), str(script), "--checkpoint", str(stored.STORED / f"step_{stored.STEP}")),
        *("--base", str(inputs / "base"), "--output", str(tmp_path / "model"), "--dtype", "fp32"),
        *("--receipt", str(tmp_path / "receipt.json")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    found = hashlib.sha256((tmp_path / "model/model.safetensors").read_bytes()).hexdigest()
    assert found == stored.EXPECTED["model_sha256"]


def test_a_damaged_checkpoint_is_set_aside_and_the_sound_one_before_it_gives_the_same_bits(resumed):
    """Step 6 is what an uninterrupted run saved; a bit of step 5 turns, and training comes there again from step 4."""
    run, losses, wanted = resumed.run_folder, resumed.losses(), tensors_of(resumed.run_folder / "step_6")
    shutil.rmtree(run / "step_6")
    stored.flip(stored.optimizer(run / "step_5", 1))
    said = resumed.run(stored.RANKS, **SAVED_OFTEN)
    assert "checkpoint step_5 is damaged, set aside as step_5.damaged" in said and "resumed from step_4" in said
    assert resumed.losses() == losses
    assert tensors_of(run / "step_6") == wanted
    assert not (run / "step_5.damaged").exists(), "training has come as far again"


def test_where_no_checkpoint_is_sound_nothing_is_trained_and_nothing_is_run(environment, inputs, tmp_path):
    trainer = Trainer(environment("train"), inputs, tmp_path)
    run = stored.place(tmp_path)
    stored.plant_gadget(stored.optimizer(run / "step_3", 0), tmp_path / "canary")
    said = trainer.run(stored.RANKS, expected=2, **stored.SETTINGS)
    assert "none of the 1 checkpoints" in said and "it asks for" in said and "step_3.damaged" in said
    assert not (tmp_path / "canary").exists() and trainer.steps_done() == 0


def test_a_checkpoint_of_another_model_is_refused_and_left_where_it_is(environment, tmp_path):
    """The base was exchanged for one with wider experts; nothing of the checkpoint is damaged."""
    wider = dataclasses.replace(stored.SHAPE, moe_intermediate_size=32)
    inputs = make_inputs(tmp_path / "inputs", stored.ROWS, wider, longest=24)
    trainer = Trainer(environment("train"), inputs, tmp_path)
    run = stored.place(tmp_path)
    before = checkpoints.sizes(run / "step_3")
    said = trainer.run(stored.RANKS, expected=2, **stored.SETTINGS)
    assert "error: checkpoint step_3 does not fit:" in said and "holds other parameters than this model" in said
    assert "is left in place" in said and "damaged" not in said and "Traceback" not in said
    assert checkpoints.sizes(run / "step_3") == before and trainer.steps_done() == 0
