"""What of a task is refused before anything runs."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_sft.errors import BadInputError
from deepseek_sft.evaluation.held_out import read_prompts
from deepseek_sft.settings import field_types, reading
from deepseek_sft.settings.evaluate import Evaluate
from deepseek_sft.task_evaluation import items

TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""


def settings(**task: Any) -> dict[str, Any]:
    evaluate = reading.parse(Evaluate, {"tasks": {"sums": task}}, "evaluate")
    return field_types.plain(evaluate)["tasks"]["sums"]


def own(folder: Path, *entries: dict[str, Any], **task: Any) -> dict[str, Any]:
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return settings(data=str(file), **task)


def lm_eval(folder: Path, text: str = TASK, **task: Any) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    file = folder / "task.yaml"
    file.write_text(text.format(data=folder / "rows.jsonl"))
    return settings(lm_eval=str(file), **task)


def asked(answer: Any = None) -> dict[str, Any]:
    entry = {"id": "a", "messages": [{"role": "user", "content": "1+1?"}]}
    return entry if answer is None else entry | {"answer": answer}


def test_expected_answers_are_taken_without_their_reasoning(tmp_path):
    task = own(tmp_path, asked("<think>\n1 and 1\n</think>\n\n2"))
    assert items.own_items("sums", task)[0]["answer"] == "2"


@pytest.mark.parametrize(
    "entry, task, word",
    [
        (asked(), {}, "no expected answer"),
        (asked("two"), {"judge": "numeric"}, "no number"),
        (asked("("), {"judge": "regex"}, "no regular expression"),
    ],
)
def test_an_item_that_could_not_be_judged_is_refused_with_task_file_and_item(entry, task, word, tmp_path):
    with pytest.raises(BadInputError, match=rf"evaluate.tasks.sums: .*items.jsonl, item a.*{word}"):
        items.check({"sums": own(tmp_path, entry, **task)})


@pytest.mark.parametrize(
    "task, word",
    [
        ({}, "either data"),
        ({"data": "a", "lm_eval": "b"}, "either data"),
        ({"data": "a", "judge": "regex", "pattern": "("}, "no regular expression"),
        ({"data": "a", "pattern": "x"}, "judge: regex alone"),
        ({"data": "a", "tolerance": 1}, "judge: numeric alone"),
        ({"data": "a", "metric": "f1"}, "metric: is of lm_eval"),
        ({"data": "a", "samples": 4}, "all the same"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(task, word):
    with pytest.raises(BadInputError, match=word):
        settings(**task)


def test_a_local_task_of_lm_eval_is_made_of_its_yaml_and_its_data(tmp_path):
    task = lm_eval(tmp_path)
    assert [path.name for path in items.lm_eval_files("sums", Path(task["lm_eval"]))] == ["task.yaml", "rows.jsonl"]


def test_included_files_and_modules_of_functions_shape_the_result(tmp_path):
    (tmp_path / "base.yaml").write_text("process_results: !function score.judge\n")
    (tmp_path / "score.py").write_text("def judge(doc, results): return {}\n")
    task = lm_eval(tmp_path, "include: base.yaml\n" + TASK)
    before = items.content("sums", task)
    (tmp_path / "score.py").write_text("def judge(doc, results): return {'a': 1}\n")
    assert items.content("sums", task) != before


@pytest.mark.parametrize(
    "text, word",
    [
        (TASK.replace("json", "openai/gsm8k"), "would be fetched"),
        (TASK.replace("{data}", "https://example.org/x.jsonl"), "nothing is fetched"),
        (TASK.replace("{data}", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        (TASK + "output_type: multiple_choice\n", "log-probabilities"),
        (TASK + "unsafe_code: true\n", "code that the model wrote"),
        (TASK + "process_results: !function lost.judge\n", "lost.py does not exist"),
        ("include: lost.yaml\n" + TASK, "lost.yaml cannot be read"),
        ("include: task.yaml\n" + TASK, "includes itself"),
        (TASK.replace("task: sums", "group: sums"), "is no task"),
        ("a: [", "cannot be read"),
        ("- a", "holds no keys"),
    ],
)
def test_a_task_file_that_could_not_run_is_refused_with_its_name(text, word, tmp_path):
    with pytest.raises(BadInputError, match=word) as refused:
        items.check({"sums": lm_eval(tmp_path, text)})
    assert "evaluate.tasks.sums: " in refused.value.problem and "task.yaml" in refused.value.problem


def test_gates_shape_no_result_and_data_does(tmp_path):
    plain = items.content("sums", own(tmp_path, asked("2")))
    assert items.content("sums", own(tmp_path, asked("2"), min=0.5, max_drop=0.1)) == plain
    assert items.content("sums", own(tmp_path, asked("3"))) != plain


def test_the_shipped_task_is_gated_above_what_guessing_gets(project):
    """Also above one that knows the language; of a constant answer a third is right at most, as the page says."""
    config = yaml.safe_load((project / "config/evaluation/demo.yaml").read_text())
    task = settings(**config["evaluate"]["tasks"]["kinds"])
    answers = Counter(item["answer"] for item in items.own_items("kinds", task | {"data": project / task["data"]}))
    assert answers.total() == 100 and max(answers.values()) <= 100 / 3
    chinese = {answer: count for answer, count in answers.items() if not answer.isascii()}
    english = {answer: count for answer, count in answers.items() if answer.isascii()}
    assert (max(chinese.values()) + max(english.values())) / 100 < task["min"]


def test_the_demos_exact_matches_are_judged_for_their_form_alone(project):
    """Guessing meets the gate and the demo's model is no better: no gate of this kind could tell them apart."""
    smoke = yaml.safe_load((project / "config/experiments/demo.yaml").read_text())["smoke_test"]
    prompts = read_prompts(project / smoke["prompts"])
    right = Counter(prompt.answer for prompt in prompts).most_common(1)[0]
    compared = [prompt for prompt in prompts if len(re.findall(r"\d\.\d", prompt.question)) == 2]
    assert (right, len(compared), len(prompts)) == (("9.4", 6), 36, 50), "as the comment beside the gate says"
    assert smoke["min_exact_match_rate"] < 6 / 50 and smoke["max_loss"] == 1 and smoke["min_loss_drop"] == 5
