"""Statistics: near duplicates, languages, weights, the cut."""

import json
import random

import numpy as np
import pytest
from unit.data.helpers import TOKENIZER, answer, called, read_lines, run_script, tool, user, write_lines

from deepseek_sft.data.samples import Settings
from deepseek_sft.data.similarity import NearDuplicates, language, signature
from deepseek_sft.data.sources import find_sources
from deepseek_sft.data.tokenization import Outputs, copies, tokenize
from deepseek_sft.data.tokens import TokenDataset
from deepseek_sft.errors import BadInputError


def run(source, **options):
    folder = source.parent
    outputs = Outputs(folder / "tokens", folder / "r.jsonl", folder / "s.json")
    tokenize(source, TOKENIZER, Settings("deepseek-r1", options.pop("max_length", 512)), outputs, **options)
    return json.loads(outputs.statistics.read_text()), [row["id"] for row in TokenDataset(outputs.tokens)]


def near(texts):
    found = NearDuplicates()
    for text in texts:
        found.add(signature(np.array(text, np.int32)))
    return found.count()


def test_near_duplicates_are_found_and_others_are_not():
    chance = np.random.default_rng(1)
    texts = [chance.integers(0, 100_000, 400) for _ in range(200)]
    changed = [text.copy() for text in texts]
    for text in changed:
        text[[100, 300]] += 1  # two of 400 tokens
    assert near(texts) == 0
    assert near([*texts, *texts]) == 200
    assert near([*texts, *changed]) >= 195


def test_near_duplicates_are_found_in_long_and_shortest_texts():
    long = np.random.default_rng(2).integers(0, 100_000, 20_000)
    assert near([long, np.concatenate([long, long[:500]]), long[::-1]]) == 1
    assert near([[1], [1], [2], [1, 2, 3], [1, 2, 3]]) == 2


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["What is it?", "An answer."], "Latin script"),
        (["为什么天空是蓝色的？", "because of Rayleigh"], "Chinese"),
        (["東京はどこですか。日本の首都です。"], "Japanese"),
        (["서울은 어디에 있습니까"], "Korean"),
        (["Почему небо голубое? sky"], "Cyrillic script"),
        (["1 + 2 = 3"], "no letters"),
        (["🙂 １２"], "no letters"),
        ([], "no letters"),
    ],
)
def test_language_is_told_by_script(texts, name):
    assert language(texts) == name


def test_weights_are_applied_counted_and_named(tmp_path):
    lines = [{"id": f"r{i}", "weight": 2.5, "messages": [user(f"Q{i}"), answer("R", "A")]} for i in range(400)]
    lines += [{"id": f"s{i}", "weight": 0.25, "messages": [user(f"P{i}"), answer("R", "A")]} for i in range(400)]
    lines += [{"id": "one", "messages": [user("O"), answer("R", "A")]}]
    statistics, ids = run(write_lines(tmp_path / "train.jsonl", lines))
    assert len(ids) == len(set(ids)) == statistics["samples"] == statistics["copies"]
    assert 940 <= sum(name.startswith("r") for name in ids) <= 1060
    assert {f"r7{copy}" for copy in ("", "~2")} <= set(ids) and ids.count("one") == 1
    assert sum(name.startswith("s") for name in ids) == 400 - statistics["records_left_out_by_weight"] < 150
    assert set(statistics["weights"]) == {"0.25", "1", "2.5"}
    assert run(tmp_path / "train.jsonl", workers=2) == (statistics, ids)


def test_chance_of_a_fraction_is_fair_and_fixed():
    drawn = [copies(1.3, f"record {i}") for i in range(5000)]
    assert set(drawn) == {1, 2} and 1.27 < sum(drawn) / 5000 < 1.33
    assert drawn == [copies(1.3, f"record {i}") for i in range(5000)]


@pytest.mark.parametrize("weight", [0, -1, "2", True, float("inf")])
def test_weight_that_is_none_is_rejected(tmp_path, weight):
    lines = [{"id": "a", "weight": weight, "messages": [user(), answer("R", "A")]}]
    lines += [{"id": "b", "messages": [user(), answer("R", "A")]}]
    statistics, _ = run(write_lines(tmp_path / "train.jsonl", lines))
    assert statistics["rejects"] == {"invalid_record": 1}


def test_weights_reach_tokenize_data_from_the_command_line(tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"messages": [user(name), answer("R", "A")]}])
    done = run_script(
        "prepare_data.py", "--source", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--weights", 1, 3,
        "--output", tmp_path / "train.jsonl", "--rejects", tmp_path / "x", "--receipt", tmp_path / "p.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a.jsonl: read as openai 1" in done.stderr
    assert [line.get("weight") for line in read_lines(tmp_path / "train.jsonl")] == [None, 3.0]
    assert run(tmp_path / "train.jsonl")[1] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:1~2", "b.jsonl:1~3"]


@pytest.mark.parametrize(("weights", "words"), [([1.0, 2.0], "2 weights"), ([0.0], "not positive")])
def test_wrong_weights_are_refused(tmp_path, weights, words):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [user(), answer("R", "A")]}])
    with pytest.raises(BadInputError, match=words):
        find_sources([str(path)], weights)


def test_cut_lengths_and_pairs_add_up(tmp_path):
    chance = random.Random(3)
    lines = [
        {"id": f"r{i}", "messages": [user(f"Q{i}"), answer("R" + " R" * chance.randint(1, 90), "A A A")]}
        for i in range(80)
    ]
    statistics, ids = run(write_lines(tmp_path / "train.jsonl", lines), max_length=64)
    histogram = statistics["length_histogram"]
    assert sum(b["samples"] for b in histogram) == len(ids) > 0
    assert sum(b["too_long"] for b in histogram) == statistics["rejects"]["too_long"] == 80 - len(ids) > 0
    assert sum(cell["turns"] for cell in statistics["reasoning_by_answer"]) == statistics["turns_with_reasoning"]
    assert statistics["max_length"] == 64 and statistics["languages"] == {"Latin script": 80}


def test_tool_calls_are_counted_as_answers(tmp_path):
    messages = [user("Q"), called("f", content=""), tool("4"), {**answer("R", "A")}]
    messages[1] |= {"loss": True}
    messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    statistics, _ = run(write_lines(tmp_path / "train.jsonl", [{"id": "a", "messages": messages}]))
    assert statistics["turns"] == 2 and statistics["answer_length"]["count"] == 2
