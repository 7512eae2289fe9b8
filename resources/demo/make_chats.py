"""Write the demo's chats, broken.jsonl, held_out.jsonl, kinds.jsonl and task.jsonl: here or into the folder given.

Small sums and comparisons of decimals with short worked reasoning, in English and Chinese, so that a tiny model on two
CPU cores learns the form within a few hundred steps. The files are committed; a test checks that they are these.

    python make_chats.py [FOLDER]
"""

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

SEED = 20250120
WITH_SYSTEM = 220  # chats of one turn with a system prompt
SEVERAL_TURNS = 300
HELD_OUT = 50
TASK = 100  # items to evaluate a model on that was trained on kinds.jsonl

WHOLE = (6, 7, 8, 9)
LONG = (11, 12, 13, 31, 32, 33)  # two decimals: 9.11
SHORT = (2, 4, 5)  # one decimal: 9.2
FIRST, SECOND = range(2, 10), range(2, 7)  # terms of sums

SYSTEM = {"en": "You are a careful calculator.", "zh": "你是一个细心的计算助手。"}
GREETING = {"en": ("Hello!", "Hello! What shall I work out?"), "zh": ("你好！", "你好！要算什么？")}
COMPARE = {
    "en": ("Which is larger, {a} or {b}?", "Compare {a} and {b}. Which one is larger?"),
    "zh": ("{a}和{b}哪个大？", "比较{a}和{b}，哪个更大？"),
}
COMPARE_WORKING = {
    "en": "The whole parts are equal. Compare the tenths: {s} and {t}. The larger tenth is {u}.",
    "zh": "整数部分相同，再比较十分位：{s}和{t}，较大的是{u}。",
}
ADD = {"en": ("What is {a} + {b}?", "Add {a} and {b}."), "zh": ("{a}加{b}等于多少？", "请计算{a}+{b}。")}
ADD_WORKING = {
    "en": "This is an addition. I start at {a} and count up by {b}. That makes {c}.",
    "zh": "这是加法，从{a}开始往上数{b}个，得到{c}。",
}
SUBTRACT = {"en": ("What is {a} - {b}?", "Subtract {b} from {a}."), "zh": ("{a}减{b}等于多少？", "请计算{a}-{b}。")}
SUBTRACT_WORKING = {
    "en": "This is a subtraction. I start at {a} and count down by {b}. That leaves {c}.",
    "zh": "这是减法，从{a}开始往下数{b}个，得到{c}。",
}
ASK_KIND = {"en": "What kind of question is this? {q}", "zh": "这是哪类问题？{q}"}
KINDS = {  # calculation, comparison: reasoning and answer
    "en": (("Numbers are added or taken away.", "calculation"), ("Two numbers are held side by side.", "comparison")),
    "zh": (("这里要做加减。", "计算"), ("这里比较两个数。", "比较")),
}

Chat = dict[str, Any]


def questions() -> list[Chat]:
    """Every question of the three families: kind, language, question, reasoning, answer."""
    found = []
    for language in ("en", "zh"):
        for phrase in COMPARE[language]:
            for whole, long, short, swap in itertools.product(WHOLE, LONG, SHORT, (False, True)):
                a, b = (short, long) if swap else (long, short)
                tenths = [int(str(decimals)[0]) for decimals in (a, b)]
                larger = a if tenths[0] > tenths[1] else b
                working = COMPARE_WORKING[language].format(s=tenths[0], t=tenths[1], u=max(tenths))
                asked = phrase.format(a=f"{whole}.{a}", b=f"{whole}.{b}")
                found.append(_question("compare", language, asked, working, f"{whole}.{larger}"))
        for a, b in itertools.product(FIRST, SECOND):
            for phrase in ADD[language]:
                working = ADD_WORKING[language].format(a=a, b=b, c=a + b)
                found.append(_question("add", language, phrase.format(a=a, b=b), working, str(a + b)))
            for phrase in SUBTRACT[language]:
                working = SUBTRACT_WORKING[language].format(a=a + b, b=b, c=a)
                found.append(_question("subtract", language, phrase.format(a=a + b, b=b), working, str(a)))
    return found


def _question(kind: str, language: str, question: str, reasoning: str, answer: str) -> Chat:
    return {"kind": kind, "language": language, "question": question, "reasoning": reasoning, "answer": answer}


def asked_and_answered(question: Chat, loss: bool | None = None) -> list[Chat]:
    """The two messages of a question; ``loss`` is written only where it is given."""
    answer = {"role": "assistant", "reasoning_content": question["reasoning"], "content": question["answer"]}
    if loss is not None:
        answer["loss"] = loss
    return [{"role": "user", "content": question["question"]}, answer]


def chats(pool: list[Chat], chance: random.Random) -> list[Chat]:
    """All training chats, shuffled: one turn each, some again under a system prompt, and some of several turns."""
    found = [(q["kind"], asked_and_answered(q)) for q in pool]
    for q in chance.sample(pool, WITH_SYSTEM):
        found.append((q["kind"], [{"role": "system", "content": SYSTEM[q["language"]]}, *asked_and_answered(q)]))
    for number in range(SEVERAL_TURNS):
        language = ("en", "zh")[number % 2]
        first, second = chance.sample([q for q in pool if q["language"] == language], 2)
        messages = [{"role": "system", "content": SYSTEM[language]}] if number % 3 == 0 else []
        if number % 5 == 4:
            greeting, reply = GREETING[language]
            messages += [{"role": "user", "content": greeting}, {"role": "assistant", "content": reply, "loss": False}]
            messages += asked_and_answered(first, True)
        else:
            messages += asked_and_answered(first, number % 5 < 2) + asked_and_answered(second, True)
        if ("turns", messages) not in found:
            found.append(("turns", messages))
    chance.shuffle(found)
    return [{"id": f"{kind}-{number:04d}", "messages": messages} for number, (kind, messages) in enumerate(found, 1)]


def held_out(pool: list[Chat], chance: random.Random) -> list[Chat]:
    """Samples to test the trained model with, question and reference; every fourth has a system prompt."""
    found = []
    for number, q in enumerate(pool, 1):
        system = [{"role": "system", "content": SYSTEM[q["language"]]}] if number % 4 == 0 else []
        found.append({"id": f"held-out-{number:02d}", "messages": [*system, *asked_and_answered(q)]})
    return found


def kinds(pool: list[Chat]) -> list[Chat]:
    """Questions about questions, which a tiny model learns to answer within a hundred steps: four answers."""
    found = []
    for number, q in enumerate(pool, 1):
        reasoning, answer = KINDS[q["language"]][q["kind"] == "compare"]
        asked = {"role": "user", "content": ASK_KIND[q["language"]].format(q=q["question"])}
        told = {"role": "assistant", "reasoning_content": reasoning, "content": answer}
        found.append({"id": f"kind-{number:03d}", "messages": [asked, told]})
    return found


def broken() -> list[str]:
    """Lines that prepare_data must reject, each for a reason of its own."""
    user = {"role": "user", "content": "What is 2 + 2?"}
    good = {"role": "assistant", "reasoning_content": "2 and 2 make 4.", "content": "4"}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": ["2 + 2"]}}
    picture = {"type": "image_url", "image_url": {"url": "sum.png"}}
    conversations = [
        ("no-messages", []),
        ("assistant-first", [good, user, good]),
        ("two-users", [user, user, good]),
        ("late-system", [user, good, {"role": "system", "content": "Be brief."}, user, good]),
        ("tool-role", [user, {"role": "tool", "content": "4"}, good]),
        ("tool-call", [user, {**good, "tool_calls": [call]}]),
        ("picture", [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, picture]}, good]),
        ("no-answer", [user, {**good, "content": None}]),
        ("unclosed-reasoning", [user, {"role": "assistant", "content": "<think>\n2 and 2 make 4.\n\n4"}]),
        ("reasoning-twice", [user, {**good, "content": "<think>\n2 and 2 make 4.\n</think>\n\n4"}]),
        ("two-reasonings", [user, {**good, "reasoning": "2 + 2 is 4."}]),
        ("reasoning-of-user", [{**user, "reasoning_content": "I wonder."}, good]),
        ("loss-of-user", [{**user, "loss": True}, good]),
        ("strange-loss", [user, {**good, "loss": "sometimes"}]),
        ("nothing-trained", [user, {**good, "loss": False}]),
    ]
    lines = [json.dumps({"id": name, "messages": messages}) for name, messages in conversations]
    return [*lines, '{"id": "cut-off", "messages": [{"role": "us', '["a", "list"]', '{"id": "fields", "text": "4"}']


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    chance = random.Random(SEED)
    pool = questions()
    chance.shuffle(pool)
    outside, inside = pool[:HELD_OUT], pool[HELD_OUT:]
    files = {
        "chats.jsonl": [json.dumps(chat, ensure_ascii=False) for chat in chats(inside, chance)],
        "held_out.jsonl": [json.dumps(chat, ensure_ascii=False) for chat in held_out(outside, chance)],
        "kinds.jsonl": [json.dumps(chat, ensure_ascii=False) for chat in kinds(pool[TASK:])],
        "task.jsonl": [json.dumps(chat, ensure_ascii=False) for chat in kinds(pool[:TASK])],
        "broken.jsonl": broken(),
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
