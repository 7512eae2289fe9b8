"""A gate that is set and could not be judged after the training is refused before it, with what to change."""

import json
from pathlib import Path

import pytest
import yaml
from unit.data.helpers import TOKENIZER

from deepseek_sft import config as configuration
from deepseek_sft import known_at_start
from deepseek_sft.errors import BadInputError
from deepseek_sft.evaluation import gate_inputs
from deepseek_sft.evaluation.held_out_losses import Measurement
from deepseek_sft.experiment import Experiment

PROJECT = Path(__file__).resolve().parents[3]
USER = {"role": "user", "content": "2 + 3?"}
BARE = {"id": "a", "messages": [USER]}
ANSWERED = {"id": "b", "messages": [USER], "answer": "5"}
ESSAY = {"id": "c", "messages": [USER, {"role": "assistant", "content": "five\nand so on"}]}
REFERENCE = {"id": "d", "messages": [USER, {"role": "assistant", "content": "5"}]}
NONE = {"min_exact_match_rate": None, "max_loss": None, "min_loss_drop": 0.0}


@pytest.fixture
def refused(tmp_path):
    """The message at start for a smoke test on these prompts; empty where it starts."""

    def start(smoke: dict, prompts: list | None, **sections) -> str:
        if prompts is not None:
            (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
            smoke = smoke | {"prompts": str(tmp_path / "prompts.jsonl")}
        config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
        demo = yaml.safe_load((PROJECT / "config/experiments/demo.yaml").read_text())
        overlay = sections | {"smoke_test": NONE | {"prompts": None} | smoke}
        experiment = Experiment.from_config(configuration.merge(configuration.merge(config, demo), overlay))
        try:
            known_at_start.check_gates(experiment)
        except BadInputError as error:
            return f"{error}"
        return ""

    return start


@pytest.mark.parametrize(
    ("gate", "judged_on", "not_on"),
    [
        ({"min_exact_match_rate": 0.5}, [ANSWERED], [BARE, ESSAY]),
        ({"min_exact_match_rate": 0.5}, [REFERENCE], [BARE]),
        ({"max_loss": 1}, [BARE, ESSAY], [BARE, ANSWERED]),
        ({"min_loss_drop": 5}, [REFERENCE], [ANSWERED]),
        ({"min_format_rate": 0.5}, [BARE], None),
    ],
)
def test_gate_is_refused_exactly_where_the_prompts_lack_what_it_judges(refused, gate, judged_on, not_on):
    assert refused(gate, judged_on) == ""
    for prompts in (not_on, None):
        message = refused(gate, prompts)
        assert f"smoke_test.{next(iter(gate))}" in message
        assert "fix: " in message
        assert f"{next(iter(gate))}: null" in message


def test_gates_at_their_defaults_need_no_prompts(refused):
    assert refused({}, None) == ""
    assert refused({}, [BARE]) == ""


def test_gates_that_lack_the_same_are_told_together(refused):
    message = refused({"max_loss": 1, "min_loss_drop": 5}, [BARE])
    assert len(message.splitlines()) == 2
    assert "smoke_test: {max_loss: null, min_loss_drop: null}" in message


def test_drop_of_a_large_model_needs_the_bases_measurement(refused, tmp_path):
    small = {"min_loss_drop": 5, "logprobs_max_parameters": 1000}
    assert "measure_held_out.py" in refused(small, [REFERENCE])
    samples = {"d": {"loss": 1.0, "tokens": 1}}
    Measurement("x", "y", 1.0, 1, samples).write(tmp_path / "base.json")
    measured = small | {"base_measured": str(tmp_path / "base.json")}
    assert refused(measured, [REFERENCE]) == ""


def test_measurement_of_other_samples_is_refused(refused, tmp_path):
    Measurement("x", "y", 1.0, 1, {"other": {"loss": 1.0, "tokens": 1}}).write(tmp_path / "base.json")
    message = refused({"base_measured": str(tmp_path / "base.json")}, [REFERENCE])
    assert "other samples" in message and "base_measured: null" in message


def test_references_that_do_not_fit_the_context_are_no_references(refused):
    long = REFERENCE | {"messages": [{"role": "user", "content": "word " * 2000}, REFERENCE["messages"][1]]}
    tokenizer = {"tokenizer": str(TOKENIZER)}
    message = refused({"max_loss": 1}, [long], data=tokenizer)
    assert "no reference" in message and "serve.max_model_len: 512" in message
    assert refused({"max_loss": 1}, [long, REFERENCE | {"id": "short"}], data=tokenizer) == ""


def test_broken_line_of_the_prompts_is_told_before_the_training(refused, tmp_path):
    (tmp_path / "broken.jsonl").write_text(json.dumps(REFERENCE) + '\n{"id": \n')
    assert "broken.jsonl, line 2: not JSON" in refused({"prompts": str(tmp_path / "broken.jsonl")}, None)


def test_large_file_is_read_in_part_and_refuses_nothing_that_it_may_hold(refused, monkeypatch):
    monkeypatch.setattr(gate_inputs, "READ_BYTES", 200)
    bare = [BARE | {"id": str(number)} for number in range(50)]
    assert refused({"max_loss": 1}, [*bare, REFERENCE]) == ""
    assert refused({"max_loss": 1}, bare[:2]) != ""


def test_gates_speak_when_their_stage_is_asked_for(tmp_path):
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    experiment = Experiment.from_config(configuration.merge(config, {"smoke_test": {"max_loss": 1}}))
    known_at_start.check_gates(experiment, {"prepare_data", "plan"})
    with pytest.raises(BadInputError, match="max_loss"):
        known_at_start.check_gates(experiment, {"smoke_test"})
    assert "max_loss" in known_at_start.gate_warnings(experiment)[0]


def test_prediction_layer_that_the_base_lacks_is_not_promised(tmp_path):
    family = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    (tmp_path / "config.json").write_text(json.dumps(family | {"num_hidden_layers": 2}))
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    overlay = {"model": {"base": str(tmp_path)}, "convert": {"mtp": "copy"}}
    experiment = Experiment.from_config(configuration.merge(config, overlay))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.layers.2.eh_proj.weight": "a"}}))
    known_at_start.check_gates(experiment, {"convert_checkpoint"})
    index.write_text(json.dumps({"weight_map": {"model.layers.1.mlp.weight": "a"}}))
    with pytest.raises(BadInputError, match="no multi-token-prediction layer"):
        known_at_start.check_gates(experiment, {"convert_checkpoint"})


@pytest.mark.parametrize(
    ("overlay", "key"),
    [
        ({"train": {"on_spike": "stop", "spike_factor": None}}, "train.on_spike"),
        (
            {"preflight": {"skip": ["all_reduce"], "all_reduce_min_gb_per_second": 100}},
            "preflight.all_reduce_min_gb_per_second",
        ),
    ],
)
def test_gate_whose_measurement_is_switched_off_is_a_contradiction(overlay, key):
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    with pytest.raises(BadInputError, match=key):
        configuration.resolve(configuration.merge(config, overlay))
