"""The checks of the smoke test. Each returns what it measured, in words, or raises CheckFailed with what it saw."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..cli import say
from .api import Api, CheckFailed, Reply, parsed
from .held_out import Prompt, final_answer, leaked_tokens, well_formed
from .settings import SmokeSettings

DEFAULT_PROMPTS = (
    Prompt("default-1", [{"role": "user", "content": "What is 2 + 3?"}], None),
    Prompt("default-2", [{"role": "user", "content": "Name a colour of the sky."}], None),
)
# Batched kernels need not be deterministic to the last bit; long answers may part after many equal characters.
SAME_CHARACTERS = 200
PROGRESS_EVERY_S = 10


@dataclasses.dataclass
class Context:
    """What the checks share.

    Attributes:
        example: the first prompt and its reply, once the chat check has it.
        max_model_len: longest context the server reports.
    """

    api: Api
    settings: SmokeSettings
    reasoning_parser: str | None
    prompts: list[Prompt]
    max_model_len: int = 0
    example: Reply | None = None
    streamed: Reply | None = None

    @property
    def max_tokens(self) -> int:
        """Longest answer to ask for: leaves half of the context to the prompt, as servers refuse what cannot fit."""
        room = self.max_model_len // 2 or self.settings.max_tokens
        return min(self.settings.max_tokens, room)

    def need_example(self) -> Reply:
        if self.example is None:
            raise CheckFailed("not possible: the check `chat` got no reply")
        return self.example


def health(context: Context) -> str:
    """``/health`` answers 200."""
    status = context.api.get("/health").status_code
    if status != 200:
        raise CheckFailed(f"/health answered {status}")
    return "200"


def model_name(context: Context) -> str:
    """The server offers the model under the name that was asked for."""
    models = parsed(context.api.get("/v1/models")).get("data") or []
    names = [entry.get("id") for entry in models]
    if context.api.model not in names:
        raise CheckFailed(f"served: {names}, expected {context.api.model}")
    context.max_model_len = models[names.index(context.api.model)].get("max_model_len") or 0
    return f"{context.api.model}, context {context.max_model_len} tokens"


def unknown_model(context: Context) -> str:
    """A model it does not have is refused with 404."""
    body = context.api.chat_body(context.prompts[0].messages, 1) | {"model": f"{context.api.model}-does-not-exist"}
    status = context.api.post("/v1/chat/completions", body).status_code
    if status != 404:
        raise CheckFailed(f"answered {status}, expected 404")
    return "404"


def chat(context: Context) -> str:
    """A chat request gets an answer that is not empty."""
    reply = context.example = context.api.chat(context.prompts[0].messages, context.max_tokens)
    if not final_answer(reply, context.reasoning_parser).strip():
        seen = f"{len(reply.reasoning)} characters of reasoning" if reply.reasoning else "nothing else either"
        raise CheckFailed(f"empty answer (finish reason {reply.finish_reason}, {seen})")
    return f"{reply.completion_tokens} tokens in {reply.seconds:.2f} s"


def reasoning_separate(context: Context) -> str:
    """Reasoning and answer come in fields of their own."""
    reply = context.need_example()
    if not reply.reasoning.strip() or not reply.answer.strip():
        raise CheckFailed(f"reasoning has {len(reply.reasoning)} characters, answer {len(reply.answer)}")
    return f"reasoning {len(reply.reasoning)} characters, answer {len(reply.answer)}"


def no_template_tokens(context: Context) -> str:
    """No token of the chat template shows up as text."""
    leaked = leaked_tokens(context.need_example(), context.reasoning_parser)
    if leaked:
        raise CheckFailed(f"in the text: {', '.join(sorted(set(leaked)))}")
    return "none"


def finish_reason(context: Context) -> str:
    """The model ends its answer by itself."""
    reply = context.need_example()
    if reply.finish_reason != "stop":
        limit = f" after {reply.completion_tokens} tokens" if reply.finish_reason == "length" else ""
        raise CheckFailed(f"finish reason is {reply.finish_reason}{limit}, expected stop")
    return "stop"


def repeatable(context: Context) -> str:
    """The same greedy request gets the same answer."""
    again = context.api.chat(context.prompts[0].messages, context.max_tokens)
    return _same(context.need_example(), again, "the second answer")


def streaming(context: Context) -> str:
    """A streamed answer is the same text, reasoning before answer, closed by ``[DONE]``."""
    reply = context.streamed = context.api.stream(context.prompts[0].messages, context.max_tokens)
    if not reply.done:
        raise CheckFailed("the stream ended without [DONE]")
    if reply.first_token_s is None:
        raise CheckFailed("the stream carried no text")
    return (
        f"{_same(context.need_example(), reply, 'the streamed answer')}, first text after {reply.first_token_s:.3f} s"
    )


def concurrency(context: Context) -> str:
    """Many requests at the same time are all answered."""
    count = context.settings.concurrency
    prompts = [context.prompts[i % len(context.prompts)] for i in range(count)]
    failures = []
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(context.api.chat, prompt.messages, context.max_tokens) for prompt in prompts]:
            try:
                future.result()
            except CheckFailed as error:
                failures.append(str(error))
    if failures:
        raise CheckFailed(f"{len(failures)} of {count} requests failed; first: {failures[0]}")
    return f"{count} of {count} answered"


def over_long_prompt(context: Context) -> str:
    """A prompt longer than the context is refused with a 4xx status, and not by dying."""
    if not context.max_model_len:
        raise CheckFailed("not possible: the server reports no max_model_len")
    messages = [{"role": "user", "content": "word " * (2 * context.max_model_len)}]
    response = context.api.post("/v1/chat/completions", context.api.chat_body(messages, 1))
    if not 400 <= response.status_code < 500:
        raise CheckFailed(f"answered {response.status_code}, expected 4xx")
    return f"{response.status_code}"


def held_out_format(context: Context, replies: list[Reply]) -> str:
    """Enough held-out prompts get closed reasoning, then an answer, then the end."""
    formed = [well_formed(reply, context.reasoning_parser) for reply in replies]
    rate = sum(formed) / len(formed)
    if rate < context.settings.min_format_rate:
        bad = [prompt.id for prompt, good in zip(context.prompts, formed, strict=True) if not good]
        raise CheckFailed(
            f"{sum(formed)} of {len(formed)} well formed = {rate:.3f}, expected at least "
            f"{context.settings.min_format_rate}; not: {', '.join(bad[:10])}"
        )
    return f"{sum(formed)} of {len(formed)} well formed"


def ask_all(context: Context) -> list[Reply]:
    """Replies to all prompts, ``concurrency`` at a time; a refused one counts as an empty reply."""

    def ask(prompt: Prompt) -> Reply:
        try:
            return context.api.chat(prompt.messages, context.max_tokens)
        except CheckFailed:
            return Reply()

    replies, said = [], time.monotonic()
    with ThreadPoolExecutor(context.settings.concurrency) as pool:
        for reply in pool.map(ask, context.prompts):
            replies.append(reply)
            if time.monotonic() - said > PROGRESS_EVERY_S:
                said = time.monotonic()
                say(f"  … {len(replies)} of {len(context.prompts)} held-out prompts answered")
    return replies


def benchmark(context: Context) -> dict[str, Any]:
    """Tokens per second of one request alone and of ``concurrency`` at once, each of up to 128 tokens."""
    tokens = min(128, context.max_tokens)

    def ask(prompt: Prompt) -> Reply:
        return context.api.stream(prompt.messages, tokens, ignore_eos=True)

    alone = ask(context.prompts[0])
    count = context.settings.concurrency
    prompts = [context.prompts[i % len(context.prompts)] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        together = list(pool.map(ask, prompts))
    slowest = max(reply.seconds for reply in together)
    return {
        "time_to_first_token_s": alone.first_token_s,
        "tokens_per_second": round(alone.completion_tokens / alone.seconds, 2),
        "tokens_per_second_concurrent": round(sum(reply.completion_tokens for reply in together) / slowest, 2),
    }


def _same(first: Reply, second: Reply, what: str) -> str:
    """Compare two greedy answers; see SAME_CHARACTERS."""
    one, two = f"{first.reasoning}\0{first.answer}", f"{second.reasoning}\0{second.answer}"
    if one == two:
        return f"equal, {len(one) - 1} characters"
    equal = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    if equal < SAME_CHARACTERS:
        near = slice(max(0, equal - 20), equal + 20)
        raise CheckFailed(f"{what} differs at character {equal}: {one[near]!r} against {two[near]!r}")
    return f"equal for {equal} characters"
