"""Families as rows: what is accepted, what is refused by name, and what a model made of one asks of a server."""

import json

import pytest
from tokenizers import Tokenizer
from unit.data import moonshot

from deepseek_sft import families
from deepseek_sft.convert.base_model import open_model
from deepseek_sft.convert.convert import copy_companions
from deepseek_sft.convert.output_tensors import output_config
from deepseek_sft.convert.tiny_model import TinyShape, write_tiny
from deepseek_sft.data import tokenizer_files
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import rows


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """A tiny model as Kimi-K2 is published: its model type, one group, no token of DeepSeek's, code beside it."""
    folder = tmp_path_factory.mktemp("kimi") / "base"
    write_tiny(folder, TinyShape(groups=1, groups_used=1), 0, 1 << 40)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_deepseek.py").write_text("raise SystemExit('run')\n")
    (folder / "tokenizer.json").unlink()
    moonshot.folder(folder, auto_map={"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]})
    return folder


def test_what_is_made_of_kimi_is_served_without_its_code(kimi, tmp_path):
    base = open_model(kimi)
    copy_companions(base, output_config(base, "bf16", "drop"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config, tokenizer = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("config", "tokenizer_config"))
    assert "auto_map" not in config and "auto_map" not in tokenizer
    assert config["model_type"] == "deepseek_v3"
    text = moonshot.soup(7, 500) + "<|im_end|>"
    made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert made.encode(text).ids == Tokenizer.from_str(tokenizer_files.tokenizer_text(kimi)).encode(text).ids


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
