"""Families as rows: what is accepted, what is refused by name, and what a model made of one asks of a server."""

import json

import family_models
import pytest
from tokenizers import Tokenizer
from unit.data import moonshot

from deepseek_sft import families
from deepseek_sft.convert import servable
from deepseek_sft.convert.base_model import open_model
from deepseek_sft.convert.convert import copy_companions
from deepseek_sft.convert.output_tensors import output_config
from deepseek_sft.data import tokenizer_files
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import rows
from deepseek_sft.serving import model_folder, settings
from deepseek_sft.verify import verify


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny base of each family whose tokenizer or shape is not DeepSeek's, as it is published, code beside it."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: family_models.write(folder / name, kind) for name, kind in family_models.KINDS.items()}


@pytest.fixture
def made(bases, tmp_path):
    """What conversion puts beside the weights."""

    def made(name):
        base = open_model(bases[name])
        folder = tmp_path / name
        folder.mkdir()
        copy_companions(base, output_config(base, "bf16", "drop"), folder)
        return base, folder

    return made


def test_what_is_made_of_kimi_is_served_without_its_code(made):
    base, folder = made("kimi")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config, tokenizer = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "tokenizer_config"))
    assert "auto_map" not in config and "auto_map" not in tokenizer
    assert config["model_type"] == "deepseek_v3"
    text = moonshot.soup(7, 500) + "<|im_end|>"
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert whole.encode(text).ids == Tokenizer.from_str(tokenizer_files.tokenizer_text(base.folder)).encode(text).ids


@pytest.mark.parametrize("name", family_models.KINDS)
def test_what_conversion_makes_of_a_familys_files_is_verified_and_served(made, name):
    base, folder = made(name)
    assert verify.check_companions(folder, base).failures == []
    with pytest.raises(BadInputError) as caught:
        model_folder.check(folder, settings.parse({"max_model_len": 512, "reasoning_parser": None}))
    assert caught.value.problem.splitlines()[1:] == ["  - it has no weights (*.safetensors)"]


@pytest.mark.parametrize("name", family_models.KINDS)
def test_a_base_of_the_family_itself_is_served_without_its_code(bases, tmp_path, name):
    servable.link(open_model(bases[name]), tmp_path / "served")
    model_folder.check(tmp_path / "served", settings.parse({"max_model_len": 512, "reasoning_parser": None}))
    names = {path.name for path in (tmp_path / "served").iterdir()}
    assert "tiktoken.model" not in names and not any(name.endswith(".py") for name in names)
    with pytest.raises(BadInputError, match="is there already"):
        servable.link(open_model(bases[name]), tmp_path / "served")


def test_a_tokenizer_with_more_tokens_than_the_model_knows_is_refused_at_start(tmp_path):
    base = family_models.write(tmp_path / "base", family_models.KINDS["moonlight"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    with pytest.raises(BadInputError, match=r"its tokenizer has \[PAD\] at 4255, config.json says vocab_size 4255"):
        open_model(base)


def test_code_beside_a_tokenizer_that_was_made_is_not_verified(made):
    base, folder = made("kimi")
    (folder / "modeling_deepseek.py").write_text("")
    assert verify.check_companions(folder, base).failures == [
        "modeling_deepseek.py is there, and servers would take it for the tokenizer's"
    ]


@pytest.mark.parametrize("model_type", rows.REFUSED)
def test_models_of_other_families_are_refused_with_what_is_missing(model_type):
    config = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": model_type}
    with pytest.raises(BadInputError, match="is not trained: ") as caught:
        families.of(config)
    assert rows.REFUSED[model_type] in str(caught.value)


@pytest.mark.parametrize("family", rows.FAMILIES, ids=lambda family: family.name)
def test_every_family_is_found_by_each_of_its_model_types(family):
    for name in family.model_types:
        assert families.of({"architectures": [rows.ARCHITECTURE], "model_type": name})
