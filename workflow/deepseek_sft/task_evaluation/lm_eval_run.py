"""Runs lm-eval in its own environment against a served model: ``python -m …lm_eval_run REQUEST MESSAGE``.

lm-eval makes the prompts (few-shot examples, descriptions), filters and scores; questions are sent by our own client,
which its OpenAI-compatible model does not replace: that one knows neither reasoning fields nor why an answer ended.

Request (JSON)::

    {"url", "model", "reasoning_parser": name or null, "concurrency", "timeout_s",
     "tasks": {name: {"settings": {…}, "items": [{"id", "messages", "answer"}] or null,
                      "transcript": path, "result": path}}}

Each result is written when its task is done; see ``measured``. An answer that is in the transcript already is not asked
for again. What went wrong is written to MESSAGE. The key of the API is read from VLLM_API_KEY. Nothing is fetched:
``measure`` tells the libraries to be offline.
"""

import importlib.metadata
import json
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from lm_eval.api.model import LM

from .. import cli, files, json_files
from ..errors import BadInputError, CrashError, StageError
from ..evaluation.api import Api, CheckFailed
from ..evaluation.final_answers import final_answer
from . import judges

SEED = 1234  # of few-shot examples
DEFAULT_STOP = "\n\n"  # lm-eval's where a task names none: made for completions, it would cut chat answers


class Deployment(LM):
    """The served model as lm-eval knows models: chat messages as JSON in, the answer after the reasoning out.

    Args:
        request: see the module.
        task: settings of the task.
        transcript: JSONL of the answers, one object a line; those in it are taken from there.
    """

    def __init__(self, request: dict[str, Any], task: dict[str, Any], transcript: Path):
        super().__init__()
        self.request, self.task = request, task
        self.api = Api(request["url"], request["model"], request["timeout_s"], os.environ.get("VLLM_API_KEY", ""))
        self.sample = 0
        self.replies: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._kept = {entry["key"]: entry for entry in _entries(transcript)}
        self._transcript = open(transcript, "a", encoding="utf-8")  # noqa: SIM115
        self._lock = threading.Lock()

    def close(self) -> None:
        self.api.close()
        self._transcript.close()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages stay messages: the server renders them."""
        return json.dumps(chat_history, ensure_ascii=False)

    @property
    def tokenizer_name(self) -> str:
        return self.request["model"]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise BadInputError("a chat API gives no log-probabilities of choices", "write output_type: generate_until")

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests: list[Any]) -> list[str]:
        with ThreadPoolExecutor(self.request["concurrency"]) as pool:
            return list(pool.map(lambda one: self._answer(*one.args[:2]), requests))

    def _answer(self, context: str, options: dict[str, Any]) -> str:
        """One answer; an empty one where the server refused, which ``problems`` then says."""
        messages = json.loads(context)
        key = files.digest([messages, self.sample], 20)
        entry = self._kept.get(key)
        try:
            entry = entry or self._ask(key, messages)
        except (CheckFailed, httpx.HTTPError) as error:
            self.problems.append(f"{str(error) or repr(error)}: {messages[-1]['content'][:200]!r}")
            return ""
        self.replies.append(entry)
        text = entry["final"]
        for stop in options.get("until") or []:
            text = text if stop == DEFAULT_STOP else text.partition(stop)[0]
        return text

    def _ask(self, key: str, messages: list[dict[str, str]]) -> dict[str, Any]:
        task = self.task
        sampling = {"temperature": task["temperature"], "top_p": task["top_p"], "seed": SEED + self.sample}
        reply = self.api.chat(messages, task["max_tokens"], **sampling)
        entry = {"key": key, "sample": self.sample, "messages": messages, "reasoning": reply.reasoning}
        entry |= {"answer": reply.answer, "finish_reason": reply.finish_reason, "tokens": reply.completion_tokens}
        # Nobody knows how an answer would have ended that its budget cut: "12" may be the start of "123".
        cut = reply.finish_reason == "length"
        entry["final"] = "" if cut else final_answer(reply, self.request["reasoning_parser"])
        with self._lock:
            self._transcript.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._transcript.flush()
        return entry


def _entries(path: Path) -> list[dict[str, Any]]:
    """What an earlier start has left; its last line may be half a line."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            entry = json_files.parse(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"key", "final", "finish_reason", "tokens"} <= set(entry):
            found.append(entry)
    return found


def own_task(name: str, settings: dict[str, Any], items: list[dict[str, Any]]) -> Any:
    """Items of one's own as a task of lm-eval."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    class Own(ConfigurableTask):
        def fewshot_context(self, doc: dict[str, Any], *arguments: Any, **options: Any) -> str:
            return doc["messages"]  # several turns, and a system's

    def judged(doc: dict[str, Any], answers: list[str]) -> dict[str, float]:
        return {settings["judge"]: float(judges.is_right(settings, answers[0], doc["answer"]))}

    rows = [one | {"messages": json.dumps(one["messages"], ensure_ascii=False)} for one in items]
    return Own(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "messages",
            "doc_to_target": "answer",
            "process_results": judged,
            "metric_list": [{"metric": settings["judge"], "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
        }
    )


def file_task(settings: dict[str, Any]) -> Any:
    """A task of lm-eval from its YAML file."""
    from lm_eval.tasks import TaskManager

    return next(iter(_manager(TaskManager).load([settings["lm_eval"]])["tasks"].values()))


def _manager(kind: Any) -> Any:
    return kind(include_defaults=False)


def run_task(name: str, entry: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """All answers to one task, scored.

    Raises:
        BadInputError: lm-eval cannot make or score the task, or the server refuses a request.
        CrashError: the server went away.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings, begin = entry["settings"], time.monotonic()
    model = Deployment(request, settings, Path(entry["transcript"]))
    scores: dict[str, list[float]] = {}
    try:
        for model.sample in range(settings["samples"]):
            task = own_task(name, settings, entry["items"]) if entry["items"] else file_task(settings)
            found = simple_evaluate(
                model,
                tasks=[task],
                task_manager=_manager(TaskManager),
                apply_chat_template=True,
                bootstrap_iters=0,
                log_samples=True,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
            _refuse_problems(name, model)
            samples = found["samples"][task.task_name]
            metric, chosen = _metric(name, settings, task, samples)
            for sample in samples:
                if sample["filter"] == chosen:
                    scores.setdefault(_id(sample), []).append(_number(name, metric, sample))
    finally:
        model.close()
    tokens = sum(reply["tokens"] for reply in model.replies)
    return {
        "metric": metric if entry["items"] else f"{metric},{chosen}",
        "items": scores,
        "answers": len(model.replies),
        "truncated": sum(reply["finish_reason"] == "length" for reply in model.replies),
        "completion_tokens": tokens,
        "seconds": round(time.monotonic() - begin, 1),
        "versions": {"lm_eval": importlib.metadata.version("lm_eval")},
        "transcript": entry["transcript"],
    }


def _refuse_problems(name: str, model: Deployment) -> None:
    if not model.problems:
        return
    try:
        model.api.get("/health")
    except httpx.HTTPError as error:
        raise CrashError(f"the server went away during evaluate.tasks.{name}: {error!r}") from None
    raise BadInputError(
        f"evaluate.tasks.{name}: {len(model.problems)} requests got no answer, so it is not judged; first: "
        f"{model.problems[0]}",
        "see there; a prompt and max_tokens must fit serve.max_model_len, an answer evaluate.request_timeout_s",
    )


def _metric(name: str, settings: dict[str, Any], task: Any, samples: list[dict[str, Any]]) -> tuple[str, str]:
    """Metric and filter to judge by."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    known = list(dict.fromkeys(metric for sample in samples for metric in sample["metrics"]))
    metric, _, chosen = (settings["metric"] or known[0]).partition(",")
    chosen = chosen or filters[0]
    if metric not in known or chosen not in filters:
        offered = ", ".join(f"{one},{other}" for one in known for other in filters)
        raise BadInputError(f"evaluate.tasks.{name}.metric: {settings['metric']!r} is none of {offered}")
    if task.higher_is_better().get(metric) is False:
        raise BadInputError(
            f"evaluate.tasks.{name}: of the metric {metric} less is better, which gates here cannot judge",
            "choose another with `metric`",
        )
    return metric, chosen


def _id(sample: dict[str, Any]) -> str:
    found = sample["doc"].get("id")
    return str(sample["doc_id"] if found is None else found)


def _number(name: str, metric: str, sample: dict[str, Any]) -> float:
    value = sample[metric]
    if not isinstance(value, bool | int | float) and not hasattr(value, "__float__"):
        raise BadInputError(
            f"evaluate.tasks.{name}: the metric {metric} gives no number for each item, so its mean has no interval",
            "choose another with `metric`",
        )
    return float(value)


def main() -> None:
    request, message = json_files.load(Path(sys.argv[1])), Path(sys.argv[2])
    for name, entry in request["tasks"].items():
        try:
            files.write_json(entry["result"], run_task(name, entry, request))
        except StageError as error:
            files.write_json(message, {"problem": error.problem, "fix": error.fix})
            sys.exit(error.exit_code)
        except (LookupError, TypeError, ValueError, ImportError, OSError) as error:
            # what lm-eval, datasets or the functions of a task raise: it is the task that cannot be used
            traceback.print_exc()
            problem = f"evaluate.tasks.{name}: lm-eval cannot run it: {type(error).__name__}: {error}"
            files.write_json(message, {"problem": problem, "fix": "the log has the lines above it"})
            sys.exit(BadInputError.exit_code)
        cli.say(f"  task {name} is done")


if __name__ == "__main__":
    cli.run(main)
