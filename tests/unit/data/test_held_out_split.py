"""What is held out is never trained on, is a share of the records, and has nothing like it on the other side."""

import json
import random

import pytest

from deepseek_sft.data.held_out_prompts import LONGEST_QUESTION, PROMPTS
from deepseek_sft.data.held_out_split import LARGEST_GROUP
from deepseek_sft.data.prepare import prepare
from deepseek_sft.data.sources import find_sources
from deepseek_sft.errors import BadInputError
from deepseek_sft.evaluation.held_out import read_prompts
from deepseek_sft.experiment import Experiment

WORDS = [f"w{number}" for number in range(3000)]


def chat(question: str, answer: str, **more) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def distinct(count: int, seed: int = 0) -> list[dict]:
    chance = random.Random(seed)
    return [chat(" ".join(chance.choices(WORDS, k=12)), " ".join(chance.choices(WORDS, k=60))) for _ in range(count)]


def run(folder, records, share=0.05, workers=1):
    folder.mkdir(exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources, output = find_sources([str(folder / "chats.jsonl")]), folder / "train.jsonl"
    figures = prepare(sources, output, folder / "rejects.jsonl", held_out=share, workers=workers)
    return figures, *(
        [json.loads(line) for line in (folder / name).open()] if (folder / name).exists() else []
        for name in ("train.jsonl", "held_out.jsonl", "held_out_prompts.jsonl")
    )


def texts(records) -> list[tuple[str, str]]:
    return [tuple(message["content"] for message in record["messages"]) for record in records]


def test_every_record_is_on_exactly_one_side_in_its_order(tmp_path):
    records = distinct(2000)
    figures, trained, held, _ = run(tmp_path / "a", records)
    sides = dict.fromkeys(texts(trained), "trained") | dict.fromkeys(texts(held), "held")
    assert len(trained) + len(held) == len(sides) == 2000
    assert [t for t in texts(records) if sides[t] == "trained"] == texts(trained)
    assert [t for t in texts(records) if sides[t] == "held"] == texts(held)
    assert figures.held_out["records"] == len(held)


def test_share_is_what_was_asked(tmp_path):
    _, _, held, _ = run(tmp_path / "a", distinct(4000))
    assert 140 <= len(held) <= 260  # 200 ± 14 (one standard deviation)


def test_side_depends_on_the_conversation_alone(tmp_path):
    records = distinct(1000)
    _, _, held, _ = run(tmp_path / "a", records)
    turned = records[::-1] + distinct(1000, seed=1)
    _, _, more, _ = run(tmp_path / "b", turned, workers=2)
    assert set(texts(held)) <= set(texts(more)) <= set(texts(held)) | set(texts(turned[1000:]))


def test_near_duplicates_and_answers_to_one_question_stay_together(tmp_path):
    chance = random.Random(3)
    groups = []
    for number, first in enumerate(distinct(600)):
        question, answer = texts([first])[0]
        if number % 2:  # the same question, answered anew
            others = [chat(question.upper() + "?", " ".join(chance.choices(WORDS, k=60))) for _ in range(3)]
        else:  # a word of the whole changed
            words = answer.split()
            words[chance.randrange(60)] = "other"
            others = [chat(question, " ".join(words)), chat(question.replace("w1", "W1", 1), answer + " end")]
        groups.append([first, *others])
    records = [record for group in groups for record in group]
    chance.shuffle(records)
    _, trained, held, _ = run(tmp_path / "a", records, share=0.2)
    held, trained = set(texts(held)), set(texts(trained))
    assert held
    for group in groups:
        assert len({text in held for text in texts(group)}) == 1


def test_what_is_alike_over_others_stays_together(tmp_path):
    first = " ".join(WORDS[:12])
    chain = [chat(f"{first} q{number // 2}", " ".join(WORDS[60 * ((number + 1) // 2) :][:60])) for number in range(8)]
    _, _, held, _ = run(tmp_path / "a", chain + distinct(300), share=0.5)
    assert len(set(texts(chain)) & set(texts(held))) in (0, 8)


def test_large_group_is_trained_on_and_counted(tmp_path):
    alike = [chat("What is the same for all of these?", " ".join(["same"] * 40 + [str(n)])) for n in range(300)]
    figures, trained, held, _ = run(tmp_path / "a", alike + distinct(1000))
    assert len(alike) > LARGEST_GROUP
    assert set(texts(alike)) <= set(texts(trained))
    assert figures.held_out["records_too_much_alike"] == 300
    assert held


def test_nothing_to_hold_out_is_said_with_what_to_do(tmp_path):
    alike = [chat("What is the same for all of these?", f"Same {number}") for number in range(50)]
    with pytest.raises(BadInputError) as raised:
        run(tmp_path / "a", alike)
    assert "50 are too much alike to part" in str(raised.value)
    assert not (tmp_path / "a/train.jsonl").exists()


def test_prompts_are_read_by_the_smoke_test(tmp_path):
    records = [record | {"id": "same"} for record in distinct(3000)]
    records += [chat("long " * LONGEST_QUESTION, f"answer {number}") for number in range(20)]
    tools = [{"type": "function", "function": {"name": "f"}}]
    records += [record | {"tools": tools} for record in distinct(200, seed=5)]
    figures, _, held, prompts = run(tmp_path / "a", records)
    read = read_prompts(tmp_path / "a/held_out_prompts.jsonl")
    assert len(read) == figures.held_out["prompts"] == PROMPTS < len(held)
    assert all(prompt.reference and len(prompt.question) <= LONGEST_QUESTION for prompt in read)
    assert set(texts(prompts)) <= set(texts(held))
    assert not any("tools" in prompt for prompt in prompts)


def test_without_a_share_nothing_else_is_written(tmp_path):
    figures, trained, held, prompts = run(tmp_path / "a", distinct(50), share=0)
    assert (len(trained), held, prompts) == (50, [], [])
    assert "held_out" not in figures.as_dict()


# ---- the experiment


def experiment(data: dict, smoke: dict | None = None, length: int = 32768) -> Experiment:
    return Experiment.from_config(
        {
            "experiment": "mine",
            "data": {"sources": ["a.jsonl"]} | data,
            "model": {"base": "b"},
            "smoke_test": smoke or {},
            "serve": {"max_model_len": length},
        }
    )


def test_held_out_prompts_are_the_smoke_tests_where_none_are_named():
    mine = experiment({"held_out": "0.5 %"})
    assert "--held-out 0.005" in mine.arguments("prepare_data")
    settings = json.loads(mine.settings("smoke_test"))["smoke_test"]
    assert settings["prompts"] == "results/mine/data/held_out_prompts.jsonl"
    assert not [text for text in mine.missing_paths(["smoke_test"]) if "prompts" in text]  # prepare_data makes them
    assert mine.state_of_prompts() == ""


def test_named_prompts_stay_the_smoke_tests():
    settings = json.loads(experiment({"held_out": 0.01}, {"prompts": "own.jsonl"}).settings("smoke_test"))
    assert settings["smoke_test"]["prompts"] == "own.jsonl"


def test_context_too_short_for_the_prompts_is_refused_at_start():
    with pytest.raises(BadInputError, match=r"serve\.max_model_len: 3000 is too short"):
        experiment({"held_out": 0.01}, {"max_tokens": 100}, length=3000)


@pytest.mark.parametrize("share", [1, -0.1, "150 %", "some", True])
def test_share_that_is_none_is_refused(share):
    with pytest.raises(BadInputError, match=r"data\.held_out"):
        experiment({"held_out": share})
