"""Run by test_lm_eval_run.py in a network namespace of its own: a stub model is evaluated by the real lm-eval.

offline_evaluation.py FOLDER PYTHON        writes FOLDER/found.json
"""

import json
import socket
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests")]

from stub_openai import Stub, serving  # noqa: E402

from deepseek_sft.errors import StageError  # noqa: E402
from deepseek_sft.settings import field_types, reading  # noqa: E402
from deepseek_sft.settings.evaluate import Evaluate  # noqa: E402
from deepseek_sft.task_evaluation import measure, measured  # noqa: E402

CUT, OPEN, WRONG = 3, 4, 5  # numbers of the items whose answer is cut, whose reasoning never closes, that is wrong
TASK = """
task: sums_by_file
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: generate_until
doc_to_text: "Q: {{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Q:"]}}
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "([0-9]+)"}}, {{function: take_first}}]}}
  - {{name: last, filter: [{{function: regex, regex_pattern: "([0-9]+)", group_select: -1}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def answer(messages: list[dict[str, str]], request: dict[str, Any]) -> dict[str, Any]:
    """The right sum after reasoning that names a wrong one; every second sampled answer is wrong."""
    number = int(messages[-1]["content"].removeprefix("Q: ").partition("+")[0])
    if number == 99:
        return {"status": 400}
    if number == OPEN:
        return {"reasoning": f"it is {number + 1}", "finish_reason": "length"}
    right = number + 1 if number != WRONG and not (request["temperature"] and request["seed"] % 2) else 0
    cut = number == CUT
    text = f"\n\nFirst {number}.\n\nThen {right}Q: 77" if "Q: " in messages[-1]["content"] else f"\n\nIt is {right}"
    return {"reasoning": "is it 42?", "content": text, "finish_reason": "length" if cut else "stop"}


def settings(tasks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return field_types.plain(reading.parse(Evaluate, {"tasks": tasks}, "evaluate"))["tasks"]


def no_network() -> bool:
    try:
        socket.create_connection(("192.0.2.1", 80), 2).close()
    except OSError:
        return True
    return False


def main(folder: Path, python: str) -> None:
    def item(number: int) -> dict[str, Any]:
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{number}+1?"}]
        return {"id": f"i{number}", "messages": asked, "answer": str(number + 1)}

    for name, numbers in (("items", range(10)), ("refused", [1, 99])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item(number)) + "\n" for number in numbers))
    rows = [{"question": f"{number}+1?", "answer": str(number + 1)} for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    own = {"data": str(folder / "items.jsonl"), "judge": "numeric", "max_tokens": 50}
    file = {"lm_eval": str(folder / "task.yaml"), "metric": "exact_match,last"}
    tasks = settings({"own": own, "sampled": own | {"samples": 4, "temperature": 0.5}, "file": file})
    subject, out = measured.Subject("model", {}, "deepseek-r1"), folder / "out"
    with serving(answer) as server:
        found = ask(python, server, subject, tasks, out)
        asked = len(server.requests)
        ask(python, server, subject, tasks, out)
        found |= {"no_network": no_network(), "asked": asked, "asked_again": len(server.requests) - asked}
        found["first"], found["keys"] = server.requests[0], sorted(map(str, server.keys))
        found["few_shot"] = next(one for one in server.requests if "Q: " in one["messages"][0]["content"])["messages"]
        try:
            ask(python, server, subject, settings({"refused": own | {"data": str(folder / "refused.jsonl")}}), out)
        except StageError as error:
            found["refused"] = [error.exit_code, error.problem]
    (folder / "found.json").write_text(json.dumps(found))


def ask(python: str, server: Stub, subject: measured.Subject, tasks: dict[str, Any], out: Path) -> dict[str, Any]:
    served = measure.Served(server.url, "stub", "deepseek_r1", 8, 30)
    results = {name: measured.read(path) for name, path in measure.measure(python, served, subject, tasks, out).items()}
    return {name: [one.scores, one.answers, one.truncated, one.metric] for name, one in results.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
