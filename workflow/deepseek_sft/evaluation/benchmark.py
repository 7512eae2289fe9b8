"""Time to first token and tokens per second of a served model, at several numbers of requests at a time.

Measured by ``vllm bench serve`` of the installed version, each request of exactly the same size. Where that program is
absent or does not work, the same load is sent from here, which counts the same things; the figures say by which.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import json_files
from ..cli import say
from ..python_path import with_library
from ..serving import versions
from . import vllm_bench
from .api import Api, CheckFailed, Reply

STARTING_S = 300  # vLLM's command line imports most of vLLM, from a file system that may be slow


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        concurrency: requests at a time.
        input_tokens, output_tokens: size of each request and of its answer; end-of-sentence tokens are ignored.
    """

    concurrency: int
    input_tokens: int
    output_tokens: int

    @property
    def requests(self) -> int:
        """Requests in all: every place is used at least twice, so that the end does not outweigh the rest."""
        return max(8, 2 * self.concurrency)


class ToolFailed(Exception):
    """``vllm bench serve`` gave no figures; the text says why."""


def loads(context_tokens: int, concurrencies: tuple[int, ...], input_tokens: int, output_tokens: int) -> list[Load]:
    """The loads to measure, made smaller where the context is shorter than they are.

    Args:
        context_tokens: longest context of the server, 0 if unknown.
    """
    if context_tokens:
        output_tokens = min(output_tokens, max(1, context_tokens // 4))
        # Random tokens decoded and encoded again may become a few more.
        input_tokens = min(input_tokens, max(1, context_tokens // 2))
    return [Load(concurrency, input_tokens, output_tokens) for concurrency in concurrencies]


def measure(api: Api, url: str, tokenizer: Path | None, to_do: list[Load], api_key: str = "") -> dict[str, Any]:
    """Figures of all loads.

    Args:
        url: base URL of the server, with or without ``/v1``.
        tokenizer: folder with the model's tokenizer, which ``vllm bench serve`` needs; None measures without it.

    Returns:
        ``{"tool", "input_tokens", "output_tokens", "by_concurrency": {concurrency: figures}}``, where figures are
        ``requests``, ``tokens_per_second`` (of answers), ``time_to_first_token_s`` (median),
        ``time_to_first_token_p99_s`` and ``time_per_output_token_s`` (median).

    Raises:
        CheckFailed: requests failed.
        httpx.HTTPError: the connection broke.
    """
    levels = ", ".join(str(load.concurrency) for load in to_do)
    say(f"  … measuring speed with {levels} requests at a time")
    try:
        if not vllm_bench.entry_point():
            raise ToolFailed("no `vllm` is installed here")
        if not tokenizer:
            raise ToolFailed("no tokenizer is at hand for vllm bench serve")
        figures = _by_vllm(api, url, tokenizer, to_do, api_key)
        tool = f"vllm bench serve {'.'.join(map(str, versions.installed() or ()))}".strip()
    except ToolFailed as why:
        say(f"  measuring without vllm bench serve: {why}")
        figures = {load.concurrency: by_hand(api, load) for load in to_do}
        tool = f"built in ({why})"
    return {
        "tool": tool,
        "input_tokens": to_do[0].input_tokens,
        "output_tokens": to_do[0].output_tokens,
        "by_concurrency": {str(concurrency): row for concurrency, row in figures.items()},
    }


def arguments(model: str, url: str, tokenizer: Path, load: Load, folder: Path) -> list[str]:
    """Arguments of ``vllm`` for one load: options that all versions since 0.8.5 have; the rest are their defaults.

    The default back end, named differently over time, is /v1/completions.
    """
    options = {
        "base-url": url.rstrip("/").removesuffix("/v1"),
        "model": model,  # --served-model-name is newer; with a tokenizer of its own, --model is only a name
        "tokenizer": tokenizer,
        "dataset-name": "random",
        "random-input-len": load.input_tokens,
        "random-output-len": load.output_tokens,
        "num-prompts": load.requests,
        "max-concurrency": load.concurrency,
        "seed": load.concurrency,  # other prompts for each load: the server's cache of prefixes must not answer
        "percentile-metrics": "ttft,tpot",
        "result-dir": folder,
        "result-filename": _result(load),
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return ["bench", "serve", *words, "--ignore-eos", "--save-result", "--disable-tqdm"]


def _result(load: Load) -> str:
    return f"{load.concurrency}.json"


def _by_vllm(api: Api, url: str, tokenizer: Path, to_do: list[Load], api_key: str) -> dict[int, dict[str, Any]]:
    environment = os.environ | ({"OPENAI_API_KEY": api_key} if api_key else {})
    # Like the smoke test's own requests, these must not leave the node by way of a site's proxy.
    environment |= dict.fromkeys(("no_proxy", "NO_PROXY"), "*")
    environment["PYTHONPATH"] = with_library(os.environ)
    limit = STARTING_S + api.timeout_s * sum(load.requests / load.concurrency + 1 for load in to_do)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, "runs.json")
        runs.write_text(json.dumps([arguments(api.model, url, tokenizer, load, Path(folder)) for load in to_do]))
        words = [sys.executable, "-m", vllm_bench.__name__, str(runs)]
        try:
            done = subprocess.run(
                words, env=environment, capture_output=True, text=True, timeout=limit, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            raise ToolFailed(f"vllm bench serve gave no result within {limit:.0f} s") from None
        output = f"{done.stdout}\n{done.stderr}"
        api.note(runs.read_text(), done.returncode, output, begin)
        return {
            load.concurrency: _figures(load, Path(folder, _result(load)), done.returncode, output) for load in to_do
        }


def _figures(load: Load, result_file: Path, exit_code: int, output: str) -> dict[str, Any]:
    try:
        result = json_files.load(result_file)
        completed = int(result["completed"])
        figures = {
            "requests": load.requests,
            "tokens_per_second": round(result["output_throughput"], 2),
            "time_to_first_token_s": round(result["median_ttft_ms"] / 1000, 4),
            "time_to_first_token_p99_s": round(result["p99_ttft_ms"] / 1000, 4),
            "time_per_output_token_s": round(result["median_tpot_ms"] / 1000, 5),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
        raise ToolFailed(f"vllm bench serve ended with {exit_code} ({error!r}): {last[:300]}") from None
    if completed != load.requests:
        raise CheckFailed(
            f"{load.requests - completed} of {load.requests} requests failed, {load.concurrency} at a time"
        )
    return figures


def by_hand(api: Api, load: Load) -> dict[str, Any]:
    """The figures of one load, measured here.

    Raises:
        CheckFailed: a request failed or its answer was cut short.
    """
    text = " ".join(str(number % 10) for number in range(load.input_tokens // 2))

    def ask(number: int) -> Reply:
        # Beginnings that no other request has: a server's cache of prefixes must not answer for it.
        messages = [{"role": "user", "content": f"{load.concurrency}-{number} {text}"}]
        return api.stream(messages, load.output_tokens, ignore_eos=True)

    begin = time.monotonic()
    with ThreadPoolExecutor(load.concurrency) as pool:
        replies = list(pool.map(ask, range(load.requests)))
    seconds = time.monotonic() - begin
    if any(reply.first_token_s is None for reply in replies):
        raise CheckFailed(f"a measured answer carried no text, {load.concurrency} at a time")
    if any(not reply.done or reply.finish_reason is None or not reply.completion_tokens for reply in replies):
        raise CheckFailed(f"a measured answer was cut or not counted, {load.concurrency} at a time")
    first = sorted(reply.first_token_s for reply in replies)
    each = [(reply.seconds - reply.first_token_s) / max(1, reply.completion_tokens - 1) for reply in replies]
    return {
        "requests": load.requests,
        "tokens_per_second": round(sum(reply.completion_tokens for reply in replies) / seconds, 2),
        "time_to_first_token_s": round(statistics.median(first), 4),
        "time_to_first_token_p99_s": round(first[min(len(first) - 1, int(0.99 * len(first)))], 4),
        "time_per_output_token_s": round(statistics.median(each), 5),
    }


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """The few figures that are compared between runs: of the lowest and of the highest concurrency."""
    by_concurrency = figures["by_concurrency"]
    low, high = (by_concurrency[str(choose(map(int, by_concurrency)))] for choose in (min, max))
    return {
        "time_to_first_token_s": low["time_to_first_token_s"],
        "tokens_per_second": low["tokens_per_second"],
        "tokens_per_second_concurrent": high["tokens_per_second"],
    }


def summary(figures: dict[str, Any]) -> str:
    """One line for the log."""
    parts = [
        f"{concurrency}: {row['tokens_per_second']:g} tokens/s, first after {row['time_to_first_token_s']:.3f} s"
        for concurrency, row in figures["by_concurrency"].items()
    ]
    return f"{'; '.join(parts)} ({figures['tool']})"
