"""Every rule, script, template, profile entry and report section has a row in ``stages``; no row names nothing."""

import re
from pathlib import Path

import pytest
import yaml

from deepseek_sft import adoption, interpreter, stages
from deepseek_sft.report import sections

PROJECT = Path(__file__).resolve().parents[2]
WORKFLOW = PROJECT / "workflow"
# Targets and tools, which make no receipt of a stage.
TARGETS = {
    *("all", "data", "model", "convert", "report", "envs", "build_env", "pack_env"),
    *("render", "render_sbatch", "render_submission", "status", "watch", "stop", "clean", "clean_preview"),
}
TOOLS = {
    *(
        "adopt",
        "build_env",
        "clean",
        "document_config",
        "evaluate",
        "measure_held_out",
        "receipt_path",
        "render_sbatch",
        "serve",
    ),
    "track",
    *("slurm_command", "status", "stop", "watch", "_bootstrap", "_single_threaded"),
}
# where the tokenizer comes with the tiny model; where a gate asks for the base's results
MAYBE = {"tokenize_data": {"prepare_model"}, "evaluate": {"evaluate_base"}}
OWN_RULE = [stage for stage in stages.ROWS if not stage.first_step_of]


def rules() -> dict[str, str]:
    """Rule → its text, of all rule files and the Snakefile."""
    texts = [path.read_text() for path in (PROJECT / "Snakefile", *sorted((WORKFLOW / "rules").glob("*.smk")))]
    blocks = [block for text in texts for block in re.split(r"^(?=rule \w+:$)", text, flags=re.MULTILINE)[1:]]
    return {
        block[len("rule ") : block.index(":")]: re.split(r"^(?=\S)", block, flags=re.MULTILINE)[1] for block in blocks
    }


def local_rules() -> set[str]:
    """Rules that run where Snakemake does."""
    texts = [path.read_text() for path in sorted((WORKFLOW / "rules").glob("*.smk"))]
    lists = [found for text in texts for found in re.findall(r"^localrules:\n((?:    \w+,\n)+)", text, re.MULTILINE)]
    return set(re.findall(r"\w+", " ".join(lists)))


def test_every_rule_has_a_row_and_every_row_a_rule():
    assert set(rules()) - TARGETS == {stage.name for stage in OWN_RULE} | {stages.REPORT}


@pytest.mark.parametrize("stage", OWN_RULE, ids=lambda stage: stage.name)
def test_a_rule_takes_the_receipts_of_its_row(stage):
    inputs = re.search(r"^    input:\n((?:        .*\n)+)", rules()[stage.name], re.MULTILINE)
    taken = set(re.findall(r'receipt\("(\w+)"\)', inputs[1] if inputs else ""))
    assert taken - MAYBE.get(stage.name, set()) == set(stage.needs)


def test_rows_say_which_rules_have_no_job_of_their_own():
    assert {stage.name for stage in OWN_RULE if stage.local} == local_rules() - TARGETS - {stages.REPORT}


def test_every_script_belongs_to_a_row_and_every_row_has_its_scripts():
    named = {script for stage in stages.ROWS for script in stage.scripts or (stage.name,)} | {stages.REPORT}
    assert {path.stem for path in (WORKFLOW / "scripts").glob("*.py")} - TOOLS == named


def test_every_template_of_a_job_belongs_to_a_row_over_nodes():
    templates = {path.name.removesuffix(".sbatch.j2") for path in (WORKFLOW / "templates").glob("*.sbatch.j2")}
    assert templates - {"macros"} == set(stages.OVER_NODES)


@pytest.mark.parametrize("stage", stages.ROWS, ids=lambda stage: stage.name)
def test_the_scripts_of_another_environment_run_where_rule_and_template_say(stage):
    if stage.environment == "workflow":
        assert not set(stage.scripts or [stage.name]) & set(interpreter.ENVIRONMENTS)
        return
    text = (WORKFLOW / "templates" / f"{stage.first_step_of or stage.name}.sbatch.j2").read_text()
    text += (WORKFLOW / "templates/macros.sbatch.j2").read_text() + (WORKFLOW / "scripts/serve_node.py").read_text()
    assert all(f"{script}.py" in text for script in stage.scripts or [stage.name])


@pytest.mark.parametrize("profile", sorted((PROJECT / "profiles").iterdir()), ids=lambda path: path.name)
def test_every_entry_of_a_profile_has_a_row(profile):
    entries = yaml.safe_load((profile / "config.yaml").read_text()).get("set-resources", {})
    assert set(entries) <= {stage.name for stage in OWN_RULE}


def test_rows_name_other_rows_alone():
    named = {name for stage in stages.ROWS for name in (*stage.needs, stage.nodes_of, stage.first_step_of) if name}
    assert named | set(adoption.OWN) <= set(stages.BY_NAME)


def test_rows_stand_in_an_order_in_which_each_can_be_made():
    made = set()
    for name in stages.CHAIN:
        assert set(stages.BY_NAME[name].needs) <= made
        made.add(name)


def test_every_section_of_the_report_with_parts_of_its_own_has_a_row():
    assert set(sections.PARTS) <= set(stages.SECTIONS)
