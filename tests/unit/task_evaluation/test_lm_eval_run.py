"""The real lm-eval in its environment, where there is no network, against a stub model on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.stage("evaluate")
PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def found(environment, tmp_path_factory) -> dict[str, Any]:
    """What offline_evaluation.py found."""
    folder = tmp_path_factory.mktemp("offline")
    unshare = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    program = [sys.executable, str(PROJECT / "tests/offline_evaluation.py"), str(folder), str(environment("evaluate"))]
    command = [*unshare, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *program]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHONPATH"))}
    done = subprocess.run(command, capture_output=True, text=True, env=variables | {"VLLM_API_KEY": "k"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_nothing_is_fetched_at_run_time(found):
    assert found["no_network"] and found["file"][1] == 10


def test_answers_are_judged_after_the_reasoning(found):
    scores, answers, _, metric = found["own"]
    assert scores == {f"i{number}": float(number not in (3, 4, 5)) for number in range(10)}
    assert (answers, metric) == (10, "numeric")


def test_answers_that_their_budget_cut_are_counted_and_wrong(found):
    scores, _, truncated, _ = found["own"]
    assert truncated == 2 and scores["i3"] == scores["i4"] == 0  # one within its answer, one within its reasoning


def test_an_items_score_is_the_mean_of_its_samples(found):
    scores, answers, truncated, _ = found["sampled"]
    assert (scores["i1"], answers, truncated) == (0.5, 40, 8)


def test_a_task_file_is_judged_by_the_metric_and_filter_that_are_asked_for(found):
    scores, _, _, metric = found["file"]
    assert metric == "exact_match,last" and sum(scores.values()) == 7


def test_few_shot_examples_are_turns_of_their_own(found):
    assert [message["role"] for message in found["few_shot"]] == ["user", "assistant"] * 2 + ["user"]


def test_the_request_has_budget_sampling_and_messages_as_they_are(found):
    expected = {"model": "stub", "max_tokens": 50, "temperature": 0, "top_p": 1, "seed": 1234}
    assert {key: found["first"][key] for key in expected} == expected
    assert [message["role"] for message in found["first"]["messages"]] == ["system", "user"]


def test_the_key_of_the_api_is_sent(found):
    assert found["keys"] == ["Bearer k"]


def test_what_is_measured_is_not_asked_again(found):
    assert found["asked"] == 10 + 40 + 10 and found["asked_again"] == 0


def test_a_request_that_the_server_refuses_is_told_and_leaves_no_result(found):
    code, problem = found["refused"]
    assert code == 2 and problem.startswith("evaluate.tasks.refused: 1 requests got no answer, so it is not judged")
