"""Texts of evaluation sets are found in records, whole or edited, and nothing else is."""

import itertools
import json
import random
import unicodedata

import numpy as np
import pytest

from deepseek_sft.data import contamination, evaluation_sets, text_tokens
from deepseek_sft.data.contamination import LONGEST, MOST_TEXTS, build
from deepseek_sft.data.evaluation_sets import EvaluationSet
from deepseek_sft.data.prepare import prepare
from deepseek_sft.data.sources import find_sources
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment

RECORDS, ITEMS, PLANTED = 10_000, 2_000, 0.03
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]


class Writer:
    """Sentences of made-up words, as unevenly used as those of a language, with its fixed phrases."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        letters = "etaoinshrdlucm"
        self.words = ["".join(self.chance.choices(letters, k=self.chance.randint(2, 9))) for _ in range(8000)]
        self.weights = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(self.words))))
        self.han = list(itertools.accumulate(1 / (rank + 2) for rank in range(len(HAN))))
        self.phrases = [self.some(self.chance.randint(4, 7)) for _ in range(300)]

    def some(self, count: int) -> list[str]:
        return self.chance.choices(self.words, cum_weights=self.weights, k=count)

    def english(self, count: int) -> str:
        found: list[str] = []
        while len(found) < count:
            found += self.chance.choice(self.phrases) if self.chance.random() < 0.15 else self.some(3)
        text = " ".join(found[:count])
        return text[0].upper() + text[1:] + "."

    def chinese(self, count: int) -> str:
        return "".join(self.chance.choices(HAN, cum_weights=self.han, k=count)) + "。"

    def question(self) -> str:
        if self.chance.random() < 0.3:
            return self.chinese(self.chance.randint(20, 120))
        return self.english(self.chance.randint(12, 80))

    def edited(self, text: str) -> str:
        """One word in ten replaced, case and punctuation changed."""
        if " " not in text:
            shown = [self.chance.choice(HAN) if self.chance.random() < 0.1 else one for one in text.rstrip("。")]
            return "，".join("".join(shown[i : i + 11]) for i in range(0, len(shown), 11)) + "？"
        words = [self.some(1)[0] if self.chance.random() < 0.1 else word for word in text.rstrip(".").split()]
        words = [word.upper() if self.chance.random() < 0.2 else word.title() for word in words]
        return ", ".join(" ".join(words[i : i + 7]) for i in range(0, len(words), 7)) + "!?"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Figures of a run over records of which 3 % hold an item, half of them edited; and which do."""
    folder = tmp_path_factory.mktemp("planted")
    writer = Writer(24)
    items = [writer.question() for _ in range(ITEMS)]
    (folder / "items.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in items))
    kinds = {}
    with (folder / "chats.jsonl").open("w") as stream:
        for number in range(RECORDS):
            question, answer = writer.question(), writer.english(writer.chance.randint(20, 200))
            if number % 1000 < 1000 * PLANTED:
                kinds[f"r{number}"] = kind = ("verbatim", "edited")[number % 2]
                item = writer.chance.choice(items)
                item = item if kind == "verbatim" else writer.edited(item)
                place = writer.chance.randrange(3)
                question = (item, f"{writer.english(9)} {item} {writer.english(5)}", question)[place]
                answer = f"{answer} {item}" if place == 2 else answer
            record = {"id": f"r{number}", "messages": [{"role": "user", "content": f"{question} {number}"},
                                                       {"role": "assistant", "content": answer}]}  # fmt: skip
            stream.write(json.dumps(record) + "\n")
    sets = (EvaluationSet(str(folder / "items.jsonl")),)
    output, rejects = folder / "train.jsonl", folder / "rejects.jsonl"
    figures = prepare(
        find_sources([str(folder / "chats.jsonl")]), output, rejects, evaluation_sets=sets, decontaminate="reject"
    )
    left_out = {line["id"] for line in map(json.loads, rejects.open()) if line["reason"] == "contaminated"}
    return figures, left_out, kinds


def found_share(planted, kind: str) -> float:
    _, left_out, kinds = planted
    of_kind = [name for name, one in kinds.items() if one == kind]
    return len(left_out & set(of_kind)) / len(of_kind)


def test_of_verbatim_items_99_percent_are_found(planted):
    assert found_share(planted, "verbatim") >= 0.99


def test_of_edited_items_90_percent_are_found(planted):
    assert found_share(planted, "edited") >= 0.9


def test_of_clean_records_at_most_one_in_a_thousand_is_flagged(planted):
    _, left_out, kinds = planted
    assert len(left_out - set(kinds)) <= 0.001 * (RECORDS - len(kinds))


def test_figures_count_what_was_left_out(planted):
    figures, left_out, _ = planted
    assert figures.contamination["records"] == figures.rejects["contaminated"] == len(left_out)
    assert figures.contamination["sets"][0]["items"] == ITEMS
    assert figures.contamination["examples"]


ITEM = "A train leaves the station at noon and travels eighty miles every hour; when does it reach the sea?"
FRENCH = "Où est née la mère de l’écrivain né à Besançon en février ?"
CHINESE = "一列火车中午出发，每小时行驶八十英里，什么时候到达海边？"
KOREAN = "서울에서 부산까지 기차로 몇 시간이 걸리는지 거리와 속도를 써서 계산하시오"
PASSAGE = " ".join(f"word{number}" for number in range(60))
TWENTY = " ".join(PASSAGE.split()[:20])


def holds(texts: list[str], message: str, asked: bool = True) -> list[int]:
    return [match.text for match in build(texts).find([[(message, asked)]])[0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ITEM, ITEM),
        (ITEM, f"Please solve this. {ITEM} Think first."),
        (ITEM, ITEM.upper().replace(" ", "\n* ")),
        (ITEM, ITEM.replace("eighty", "ninety")),
        (FRENCH, "ou est nee la mere de l'ecrivain ne a besancon en fevrier"),
        (FRENCH, unicodedata.normalize("NFD", FRENCH)),
        (CHINESE, f"题目：{CHINESE.replace('，', '、')}"),
        (KOREAN, f"Q {KOREAN}."),
        (PASSAGE, " ".join(PASSAGE.split()[:40])),
        ("Compare 8.13 and 8.4. Which one is larger?", "Compare 8.13 and 8.4: which one is greater?"),
        ("What is gravity made of?", "what is Gravity made of"),
        # just as many runs as it takes: twelve that share no word, and two of a text whose other words stand alone
        (PASSAGE, " ".join("x" if number % 5 == 4 else word for number, word in enumerate(PASSAGE.split()))),
        (TWENTY, " ".join("x" if number in (5, 9, 13, 17) else word for number, word in enumerate(TWENTY.split()))),
    ],
)  # fmt: skip
def test_text_is_found_whatever_its_form(text, message):
    assert holds([text], message) == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ITEM, "A train leaves the station at noon and nobody knows where it goes, nor who built it and what for."),
        (ITEM, " ".join(sorted(ITEM.split()))),
        (PASSAGE, " ".join(PASSAGE.split()[:25])),
        (PASSAGE, " ".join(w + " x" * 40 for w in (" ".join(PASSAGE.split()[i : i + 6]) for i in range(0, 60, 6)))),
        ("What is gravity made of?", "Tell me: what is gravity made of, and who found it?"),
        ("Paris", "Paris"),
        ("Compare 8.13 and 8.4. Which one is larger?", "Compare 8.13 and 8.2. Which one is larger?"),
    ],
)
def test_text_that_is_not_there_is_not_found(text, message):
    assert holds([text], message) == []


def test_short_text_counts_only_where_a_user_asks_it():
    assert holds(["What is gravity made of?"], "What is gravity made of?", asked=False) == []


def test_what_many_items_share_is_no_evidence():
    head = "Answer the following multiple choice question by writing one letter and nothing else after it."
    texts = [f"{head} {Writer(number).english(14)}" for number in range(MOST_TEXTS + 1)]
    assert holds(texts, f"{head} {Writer(99).english(20)}") == []
    assert holds(texts, f"{head} {Writer(3).english(14)}") == [3]


def test_what_is_found_is_the_same_however_few_bits_runs_are_added_up_by(monkeypatch):
    writer = Writer(31)
    items = [writer.question() for _ in range(300)]
    chosen = [writer.chance.choice(items) for _ in range(200)]
    records = [[(writer.question(), True), (f"{writer.english(30)} {writer.edited(item)}", False)] for item in chosen]
    found = []
    for bits in (1, 15, 20):
        monkeypatch.setattr(contamination, "_PAIR_SHIFT", np.uint64(64 - bits))
        found.append(build(items).find(records))
    assert found[0] == found[1] == found[2] and sum(map(bool, found[0])) > 150


def test_bits_hold_the_numbers_that_were_put_in_and_no_others():
    chance = np.random.default_rng(31)
    numbers = chance.integers(1 << 20, size=5000, dtype=np.uint64)
    asked = np.arange(1 << 20, dtype=np.uint64)
    there = contamination._has(contamination._bits(numbers, 20), asked.copy())
    assert set(np.flatnonzero(there).tolist()) == set(numbers.tolist())


def test_runs_do_not_go_from_one_message_to_the_next():
    words = ITEM.split()
    index = build([ITEM])
    assert not index.find([[(" ".join(words[i : i + 3]), True) for i in range(0, len(words), 3)]])[0]


def test_item_is_found_at_any_place_of_a_long_message():
    filler = "lorem ipsum " * (LONGEST // 12)
    index = build([ITEM])
    for before in (LONGEST - 8200, LONGEST - 8192, LONGEST - 60, LONGEST - 1, LONGEST):
        assert index.find([[(f"{filler[:before]} {ITEM} {filler}", False)]])[0], before


def test_words_do_not_depend_on_what_stands_beside_them():
    reader = text_tokens.Reader()
    alone = reader.tokens(["abc", "中"])
    together = reader.tokens(["abc中", "中abc", "(abc)", "ABC", "ａｂｃ"])
    abc, char = alone.values[0], alone.values[2]
    values = [together.values[a:b].tolist() for a, b in itertools.pairwise(together.starts)]
    assert [one[:-1] for one in values] == [[abc, char], [char, abc], [abc], [abc], [abc]]


def test_number_of_a_text_does_not_depend_on_the_texts_around_it():
    writer, reader = Writer(5), text_tokens.Reader()
    texts = [writer.question() for _ in range(50)] + ["", " ", "\ud800 half", "\uffff", "e\u0301", "a\0b"]
    together = reader.tokens(texts)
    for number, text in enumerate(texts):
        alone = reader.tokens([text])
        begin, end = together.starts[number], together.starts[number + 1]
        assert together.values[begin:end].tolist() == alone.values.tolist()


# ---- files of sets, and the stage


def run(tmp_path, sets, policy="report", chats=(ITEM, "Something else entirely, asked by nobody."), workers=1):
    lines = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "Yes."}]} for c in chats]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output, rejects = tmp_path / "train.jsonl", tmp_path / "rejects.jsonl"
    sources = find_sources([str(tmp_path / "chats.jsonl")])
    evaluation_sets.load.cache_clear()
    options = {"evaluation_sets": sets, "decontaminate": policy} if sets else {}
    return prepare(sources, output, rejects, workers=workers, **options), output, rejects


FORMS = {
    "items.jsonl": json.dumps({"question": ITEM}) + "\n",
    "items.json": json.dumps([{"doc": {"q": ITEM}}]),
    "strings.json": json.dumps([ITEM]),
    "items.txt": f"\n{ITEM}\n\n",
    "chats.json": json.dumps([{"messages": [{"role": "user", "content": ITEM}]}]),
    "lists.jsonl": json.dumps({"turns": ["Hello", ITEM]}),
}  # fmt: skip
FIELDS = {"items.json": ("doc.q",), "lists.jsonl": ("turns",)}


@pytest.mark.parametrize("name", FORMS)
def test_set_of_every_form_is_read(tmp_path, name):
    path = tmp_path / "sets" / name
    path.parent.mkdir()
    path.write_text(FORMS[name])
    figures, _, _ = run(tmp_path, (EvaluationSet(str(path), FIELDS.get(name, ())),))
    assert figures.contamination["sets"][0]["items_found"] == 1


def test_report_keeps_the_record_and_reject_sets_it_aside_with_the_item(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text(ITEM)
    without = run(tmp_path, ())[1].read_bytes()
    figures, output, _ = run(tmp_path, (EvaluationSet(str(path)),))
    assert (output.read_bytes(), figures.contamination["records"]) == (without, 1)
    figures, output, rejects = run(tmp_path, (EvaluationSet(str(path)),), "reject")
    assert (figures.accepted, figures.rejects["contaminated"]) == (1, 1)
    assert f"{path}:1" in json.loads(rejects.read_text())["message"]


def test_figures_are_the_same_for_any_number_of_workers(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text(ITEM)
    chats = [ITEM if number % 7 == 0 else f"Question {number}: {PASSAGE}" for number in range(700)]
    one, three = (run(tmp_path, (EvaluationSet(str(path)),), chats=chats, workers=n)[0].as_dict() for n in (1, 3))
    assert one == three


def test_without_sets_figures_are_as_before(tmp_path):
    assert "contamination" not in run(tmp_path, ())[0].as_dict()


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        ('{"a": "b"}\n', (), "none of its 1 items has text in question"),
        ('{"a": "b"}\n', ("c",), "the first item has a"),
        ("{broken\n", (), "items.jsonl:1 is no JSON"),
        ("", (), "holds no item"),
    ],
)
def test_set_that_cannot_be_used_is_named(tmp_path, content, fields, says):
    path = tmp_path / "items.jsonl"
    path.write_text(content)
    evaluation_sets.load.cache_clear()
    with pytest.raises(BadInputError) as raised:
        evaluation_sets.load((EvaluationSet(str(path), fields),))
    assert says in str(raised.value)


def test_missing_set_is_named(tmp_path):
    with pytest.raises(BadInputError, match=r"evaluation set .*nothing\.jsonl does not exist"):
        evaluation_sets.load((EvaluationSet(str(tmp_path / "nothing.jsonl")),))


# ---- the experiment


def experiment_with(path: str) -> Experiment:
    data = {"sources": ["config/config.yaml"], "decontaminate": "reject", "evaluation_sets": [{"path": path}]}
    base = {"experiment": "mine", "accelerator": "cpu", "data": data, "model": {"tiny": {}}}
    return Experiment.from_config(base | {"train": {"ranks_per_node": 2, "sequence_parallel_size": 2}})


def test_stage_is_given_the_sets_and_run_again_when_they_change(tmp_path):
    path = tmp_path / "items.txt"
    path.write_text(ITEM)
    experiment = experiment_with(str(path))
    assert experiment.arguments("prepare_data").endswith(f"--decontaminate reject --evaluation-sets {path}")
    before = experiment.state_of_sources()
    path.write_text("other")
    assert experiment.state_of_sources() != before


def test_missing_set_is_named_at_start(tmp_path):
    missing = experiment_with(f"{tmp_path}/items.txt").missing_paths(["prepare_data"])
    assert [text.partition(":")[0] for text in missing] == ["data.evaluation_sets[0]"]


@pytest.mark.parametrize("data", [{"decontaminate": "report"}, {"evaluation_sets": ["items.txt"]}])
def test_one_key_without_the_other_is_refused(data):
    with pytest.raises(BadInputError, match="evaluation_sets"):
        Experiment.from_config({"experiment": "mine", "data": {"sources": ["a.jsonl"]} | data, "model": {"base": "b"}})
