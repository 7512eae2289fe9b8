"""A model folder that cannot be served is told in one message, before vLLM starts."""

import json
from pathlib import Path

import pytest
import serving_fakes
import small_models

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import model_folder, settings

SETTINGS = settings.parse({"max_model_len": serving_fakes.CONTEXT})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    serving_fakes.write_model(tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def message(model: Path, given: settings.ServeSettings = SETTINGS) -> str:
    with pytest.raises(BadInputError) as raised:
        model_folder.check(model, given)
    return str(raised.value)


def test_whole_folder_passes(model):
    model_folder.check(model, SETTINGS)


def test_folder_that_is_not_there(tmp_path):
    assert "does not exist on this node" in message(tmp_path / "nowhere")


def test_folder_without_config(model):
    (model / "config.json").unlink()
    assert "config.json is missing" in message(model)


def test_missing_and_cut_shards_are_all_named(model):
    (model / "model-1.safetensors").unlink()
    whole = (model / "model-2.safetensors").read_bytes()
    (model / "model-2.safetensors").write_bytes(whole[:-1])
    text = message(model)
    assert "model-1.safetensors is missing" in text
    assert f"model-2.safetensors has {len(whole) - 1} bytes, its header describes {len(whole)}" in text


def test_shard_of_another_model_is_named(model):
    index = model / "model.safetensors.index.json"
    change(index, weight_map=json.loads(index.read_text())["weight_map"] | {"extra": "model-1.safetensors"})
    assert "model-1.safetensors lacks 1 tensors" in message(model)


def test_folder_without_weights(model):
    for path in model.glob("*.safetensors*"):
        path.unlink()
    assert "it has no weights" in message(model)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"rope_theta": None}, "rope_theta missing"),
        ({"index_topk": 8}, "unknown keys, which may change"),
        ({"num_nextn_predict_layers": 0}, "num_nextn_predict_layers is 0, but the weights hold 1 such layers"),
    ],
)
def test_a_configuration_that_vllm_would_read_otherwise_or_end_with_is_named(tmp_path, changes, text):
    base = small_models.make_base(tmp_path / "base")
    small_models.make_fp8_release(base, tmp_path / "model")
    given = settings.parse({"max_model_len": serving_fakes.CONTEXT})
    found = list(
        model_folder._configuration(tmp_path / "model", json.loads((tmp_path / "model/config.json").read_text()))
    )
    assert found == []
    config = json.loads((tmp_path / "model/config.json").read_text()) | changes
    (tmp_path / "model/config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert text in message(tmp_path / "model", given)


def test_tokenizer_of_a_larger_model(model):
    change(model / "config.json", vocab_size=3)
    assert "token ids up to 6, but the model knows 3 tokens: it is another model's" in message(model)


def test_tokenizer_whose_end_of_sentence_is_another_token(model):
    change(model / "config.json", eos_token_id=2)
    assert "has id 1, but config.json's eos_token_id is 2" in message(model)


def test_tokenizer_without_think_tokens_matters_only_to_the_parser(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [e for e in tokenizer["added_tokens"] if "think" not in e["content"]]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "lacks <think> and </think>" in message(model)
    model_folder.check(model, settings.parse({"max_model_len": serving_fakes.CONTEXT, "reasoning_parser": None}))


def test_missing_tokenizer_and_template(model):
    change(model / "tokenizer_config.json", chat_template=None)
    assert "no chat template" in message(model)
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in message(model)


def test_context_longer_than_the_models(model):
    text = message(model, settings.parse({"max_model_len": 1 << 20}))
    assert f"max_position_embeddings is {serving_fakes.CONTEXT}, below serve.max_model_len 1048576" in text
