"""A family is chosen by ``config.json`` in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft import families
from deepseek_sft.convert import tiny_model
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import deepseek_v3

WORKFLOW = Path(__file__).resolve().parents[3] / "workflow"
CONFIG = tiny_model.config_of(tiny_model.TinyShape())
MODULES = {family.__name__.rsplit(".", 1)[-1] for family in families.FAMILIES.values()}


def test_a_config_finds_its_family():
    assert families.of(CONFIG) is deepseek_v3
    assert families.is_known(CONFIG) and not families.is_known({"model_type": "llama"})


@pytest.mark.parametrize("key, value", [("model_type", "llama"), ("architectures", ["LlamaForCausalLM"])])
def test_a_config_of_no_family_is_refused_with_what_it_says_and_what_is_trained(key, value):
    with pytest.raises(BadInputError) as refused:
        families.checked(CONFIG | {key: value}, Path("base/config.json"))
    assert "base/config.json: architectures" in refused.value.problem
    assert str(value) in refused.value.problem and "DeepseekV3ForCausalLM" in refused.value.problem


def test_nobody_else_imports_the_module_of_a_family():
    found = set()
    for path in WORKFLOW.glob("**/*.py"):
        if path.parent.name == "families":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "transformers":
                names = {*(node.module or "").split("."), *(alias.name for alias in node.names)}
                if names & MODULES:
                    found.add(path.relative_to(WORKFLOW).as_posix())
    assert found == set()


def test_asking_for_a_family_needs_no_torch():
    code = "import sys; from deepseek_sft import families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(WORKFLOW)}).returncode == 0
