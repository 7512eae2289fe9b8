"""The checks of the smoke test on how the server behaves.

Each returns what it measured, in words, or raises CheckFailed with what it saw, or CheckSkipped with why it does not
apply.
"""

import dataclasses
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import files
from ..data.base_rendering import base_template
from ..data.chat_templates import BASE, TEMPLATES
from ..data.encoding import load_encoder
from ..data.messages import split_reasoning
from ..settings.smoke_settings import SmokeSettings
from . import answer_fields, speech, template_tokens
from .api import Api, CheckFailed, CheckSkipped, Reply, parsed
from .held_out import Prompt, final_answer, leaked_tokens
from .held_out_tokens import expected_prompt
from .transformers_comparison import ModelFolder

DEFAULT_PROMPTS = (
    Prompt("default-1", [{"role": "user", "content": "What is 2 + 3?"}], None),
    Prompt("default-2", [{"role": "user", "content": "Name a colour of the sky."}], None),
)
# Batched kernels need not be deterministic to the last bit; long answers may part after many equal characters.
SAME_CHARACTERS = 200
# A reasoning model may lose itself in a loop now and then; one that does so more often is broken.
BROKEN_SHARE = 0.1
SINGLE_TRIES = 3  # prompts that single requests may be made with, where an answer without end is allowed
NAMED = 10  # prompts that a message names
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}
FILLER = range(100, 1000)  # ids of ordinary tokens in every tokenizer, for prompts of an exact length


def order(prompt: Prompt) -> str:
    """What prompts are put in order by: a hash of their content."""
    return files.digest([prompt.messages, prompt.reference, prompt.answer], 64)


@dataclasses.dataclass
class Context:
    """What the checks share.

    Attributes:
        api, settings: the server and what is asked of it.
        reasoning_parser: the server's parser; None if reasoning stays in the text.
        prompts: held-out samples, else DEFAULT_PROMPTS.
        tool_call_parser: the server's parser of tool calls; None if calls stay in the text.
        held_out: whether they are held-out samples.
        model: folder of the served model; None where it is not at hand.
        base: folder of the model that training started from; None where it is not at hand.
        expected_len: context the server was started with; None if unknown.
        max_model_len: longest context the server reports.
        example: the reply to the prompt that single requests are made with, once the check ``chat`` has it.
        chosen: that prompt, where it is not the first.
        replies: everything the model has said, with the prompt it answers.
    """

    api: Api
    settings: SmokeSettings
    reasoning_parser: str | None
    prompts: list[Prompt]
    held_out: bool = False
    model: ModelFolder | None = None
    base: Path | None = None
    dtype: str = "auto"
    expected_len: int | None = None
    max_model_len: int = 0
    example: Reply | None = None
    chosen: Prompt | None = None
    tool_call_parser: str | None = None
    replies: list[tuple[Prompt, Reply]] = dataclasses.field(default_factory=list)

    @property
    def template_tokens(self) -> re.Pattern[str]:
        """Finds tokens of the served folder's chat template in text."""
        return template_tokens.of_folder(self.model.path if self.model else None)

    @property
    def max_tokens(self) -> int:
        """Longest answer to ask for: leaves half of the context to the prompt, as servers refuse what cannot fit."""
        room = self.max_model_len // 2 or self.settings.max_tokens
        return min(self.settings.max_tokens, room)

    @property
    def in_any_order(self) -> list[Prompt]:
        """The prompts by a hash of their content: what single requests are made with does not hang on their order."""
        return sorted(self.prompts, key=order)

    @property
    def prompt(self) -> Prompt:
        """The prompt that single requests are made with."""
        return self.chosen or self.in_any_order[0]

    @property
    def spare_prompts(self) -> list[Prompt]:
        """What single requests may be made with instead, where some answers may miss their form (reach the limit)."""
        rate = self.settings.min_format_rate
        allowed = self.held_out and rate is not None and rate < 1
        return self.in_any_order[1:SINGLE_TRIES] if allowed else []

    def options(self, prompt: Prompt) -> dict[str, Any]:
        """What a request says to the chat template: V3.1's opens the reasoning only where ``thinking`` asks for it."""
        if not self._prompt_decides:
            return {}
        asked = self.asks_to_think(prompt)
        names = ("thinking", "enable_thinking") if self.settings.template == BASE else ("thinking",)
        return {"chat_template_kwargs": dict.fromkeys(names, asked)}

    def asks_to_think(self, prompt: Prompt) -> bool:
        """Whether a request for this prompt asks for reasoning."""
        if self._prompt_decides and prompt.reference is not None:
            return bool(split_reasoning(prompt.reference)[0])
        return bool(self.reasoning_parser)

    @property
    def _prompt_decides(self) -> bool:
        if self.settings.template == BASE:
            return bool(self.model) and base_template(load_encoder(self.model.path, BASE)).reasoning.asked
        template = TEMPLATES.get(self.settings.template or "")
        return template is not None and template.prompt_decides_thinking

    def ask(self, prompt: Prompt) -> Reply:
        """A prompt's reply in one piece, remembered."""
        reply = self.api.chat(prompt.messages, self.max_tokens, return_token_ids=True, **self.options(prompt))
        self.replies.append((prompt, reply))
        return reply

    def need_example(self) -> Reply:
        """The reply of the check ``chat``; without one a check on it cannot be made."""
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
    models = answer_fields.objects(parsed(context.api.get("/v1/models")), "data")
    names = [answer_fields.text(entry, "id") for entry in models]
    if context.api.model not in names:
        raise CheckFailed(f"served: {names}, expected {context.api.model}")
    served = models[names.index(context.api.model)]
    if served.get("max_model_len") is not None:  # a server that does not tell it fails the checks that need it
        context.max_model_len = answer_fields.count(served, "max_model_len")
    if context.expected_len and context.max_model_len != context.expected_len:
        raise CheckFailed(f"context {context.max_model_len} tokens, configured are {context.expected_len}")
    return f"{context.api.model}, context {context.max_model_len} tokens"


def unknown_model(context: Context) -> str:
    """A model it does not have is refused with 404."""
    body = context.api.chat_body(context.prompt.messages, 1) | {"model": f"{context.api.model}-does-not-exist"}
    status = context.api.post("/v1/chat/completions", body).status_code
    if status != 404:
        raise CheckFailed(f"answered {status}, expected 404")
    return "404"


def chat(context: Context) -> str:
    """A chat request gets an answer that is not empty."""
    reply = context.example = context.ask(context.prompt)
    passed_over = ""
    for prompt in context.spare_prompts if reply.finish_reason == "length" else []:
        other = context.ask(prompt)
        if other.finish_reason != "length":
            passed_over = f"; the answer to {context.prompt.id} reached the limit, {prompt.id} is asked instead"
            reply, context.chosen, context.example = other, prompt, other
            break
    if not final_answer(reply, context.reasoning_parser).strip():
        seen = f"{len(reply.reasoning)} characters of reasoning" if reply.reasoning else "nothing else either"
        raise CheckFailed(f"empty answer (finish reason {reply.finish_reason}, {seen})")
    return f"{reply.completion_tokens} tokens in {reply.seconds:.2f} s{passed_over}"


def reasoning_separate(context: Context) -> str:
    """Reasoning and answer come in fields of their own, where a prompt asks for reasoning."""
    if not context.reasoning_parser:
        raise CheckSkipped("the server has no reasoning parser")
    thinking = [prompt for prompt in context.in_any_order if context.asks_to_think(prompt)]
    if not thinking:
        raise CheckSkipped("no prompt asks for reasoning")
    prompt = context.prompt if context.prompt in thinking else thinking[0]
    reply = context.need_example() if prompt == context.prompt else context.ask(prompt)
    if not reply.reasoning.strip() or not reply.answer.strip():
        raise CheckFailed(
            f"reasoning has {len(reply.reasoning)} characters, answer {len(reply.answer)} (prompt {prompt.id})"
        )
    return f"reasoning {len(reply.reasoning)} characters, answer {len(reply.answer)}"


def answers_are_text(context: Context) -> str:
    """Reasoning and answers consist of words, and are not the same words over and over."""
    context.need_example()
    found: dict[str, str] = {}
    for prompt, reply in context.replies:
        for text in (reply.reasoning, reply.answer):
            if problem := speech.problem(text):
                found.setdefault(prompt.id, problem)
    asked = {prompt.id for prompt, _ in context.replies}
    if len(found) > BROKEN_SHARE * len(asked):
        name, problem = next(iter(found.items()))
        raise CheckFailed(f"{len(found)} of {len(asked)} prompts got broken text, such as {name}: {problem}")
    broken = f", broken text for {len(found)}: {', '.join(list(found)[:NAMED])}" if found else ""
    return f"answers to {len(asked)} prompts{broken}"


def no_template_tokens(context: Context) -> str:
    """No token of the chat template shows up as text, in any answer of the whole test."""
    context.need_example()
    found: dict[str, str] = {}
    for prompt, reply in context.replies:
        for token in leaked_tokens(reply, context.reasoning_parser, context.template_tokens):
            found.setdefault(token, prompt.id)
    if found:
        named = ", ".join(f"{token} (first in the answer to {name})" for token, name in sorted(found.items()))
        raise CheckFailed(f"in the text: {named}")
    return f"none in {len(context.replies)} answers"


def tool_calls(context: Context) -> str:
    """A request that offers a tool is answered, and what the parser takes for a call names it and has JSON for it.

    Raises:
        CheckFailed: the server refuses it, or returns a call that no client can make.
    """
    options = {"tools": [TOOL], "tool_choice": "auto"} | context.options(context.prompt)
    body = context.api.chat_body(context.prompt.messages, context.max_tokens, **options)
    choice = answer_fields.objects(parsed(context.api.post("/v1/chat/completions", body)), "choices")[0]
    message = answer_fields.mapping(choice, "message")
    made = answer_fields.objects(message, "tool_calls") if message.get("tool_calls") else []
    for call in made:
        function = answer_fields.mapping(call, "function")
        name, arguments = (answer_fields.text(function, field) for field in ("name", "arguments"))
        try:
            whole = isinstance(json.loads(arguments), dict)
        except (ValueError, RecursionError):
            whole = answer_fields.text(choice, "finish_reason") == "length"  # cut while it was written
        if name != TOOL["function"]["name"] or not whole:
            raise CheckFailed(f"a call of {name!r} with {arguments[:80]!r}: offered was {TOOL['function']['name']}")
    return f"{len(made)} calls" if made else "answered without a call"


def finish_reason(context: Context) -> str:
    """The model ends its answer by itself, with its end-of-sentence token."""
    reply = context.need_example()
    if reply.finish_reason != "stop":
        limit = f" after {reply.completion_tokens} tokens" if reply.finish_reason == "length" else ""
        raise CheckFailed(f"finish reason is {reply.finish_reason}{limit}, expected stop")
    ends = context.model.eos_token_ids() if context.model else []
    if not ends or not reply.token_ids:
        return "stop"
    last = reply.token_ids[1][-1]
    if last not in ends:
        raise CheckFailed(f"stopped at token {last}, the model's end-of-sentence tokens are {ends}")
    return f"stop at end-of-sentence token {last}"


def repeatable(context: Context) -> str:
    """The same greedy request gets the same answer."""
    first = context.need_example()
    return _same(first, context.ask(context.prompt), "the second answer")


def streaming(context: Context) -> str:
    """A streamed answer is the same text in pieces, reasoning before answer, with its end told and ``[DONE]``."""
    prompt = context.prompt
    reply = context.api.stream(prompt.messages, context.max_tokens, **context.options(prompt))
    context.replies.append((prompt, reply))
    if not reply.done:
        raise CheckFailed("the stream ended without [DONE]")
    if reply.finish_reason is None:
        raise CheckFailed("the stream ended without a finish_reason")
    if reply.first_token_s is None:
        raise CheckFailed("the stream carried no text")
    if not reply.in_order:
        raise CheckFailed("reasoning came after the answer had begun")
    plain = context.need_example()
    if reply.finish_reason != plain.finish_reason:
        raise CheckFailed(f"finish reason is {reply.finish_reason}, without streaming {plain.finish_reason}")
    same = _same(plain, reply, "the streamed answer")
    return f"{same}, {reply.pieces} pieces, first text after {reply.first_token_s:.3f} s"


def concurrency(context: Context) -> str:
    """Many requests at the same time are all answered, each with an answer of its own."""
    count = context.settings.concurrency
    some = context.in_any_order
    prompts = [some[i % len(some)] for i in range(count)]
    failures = []
    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(context.ask, prompt) for prompt in prompts]:
            try:
                reply = future.result()
            except CheckFailed as error:
                failures.append(str(error))
                continue
            if not (reply.reasoning or reply.answer):
                failures.append(f"an empty answer, finish reason {reply.finish_reason}")
    if failures:
        raise CheckFailed(f"{len(failures)} of {count} requests failed; first: {failures[0]}")
    return f"{count} of {count} answered"


def context_limit(context: Context) -> str:
    """A request that fills the context to its last token is answered; one token more is refused with 4xx."""
    if not context.max_model_len:
        raise CheckFailed("not possible: the server reports no max_model_len")
    longest = context.max_model_len - 1  # one token is left for the answer
    full = parsed(context.api.post("/v1/completions", _filled(context, longest)))
    used = answer_fields.count(answer_fields.mapping(full, "usage"), "total_tokens")
    if used != context.max_model_len:
        raise CheckFailed(f"a prompt of {longest} tokens and one of answer made {used} tokens: the prompt was cut")
    response = context.api.post("/v1/completions", _filled(context, longest + 1))
    if not 400 <= response.status_code < 500:
        raise CheckFailed(f"one token more was answered {response.status_code}, expected 4xx")
    if "error" not in response.text:
        raise CheckFailed(f"{response.status_code} without an error message: {response.text[:200]!r}")
    return f"{context.max_model_len} tokens answered, one more refused with {response.status_code}"


def _filled(context: Context, tokens: int) -> dict:
    prompt = [FILLER[i % len(FILLER)] for i in range(tokens)]
    return {"model": context.api.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}


def over_long_prompt(context: Context) -> str:
    """A prompt longer than the context is refused with a 4xx status, and not by dying."""
    if not context.max_model_len:
        raise CheckFailed("not possible: the server reports no max_model_len")
    messages = [{"role": "user", "content": "word " * (2 * context.max_model_len)}]
    response = context.api.post("/v1/chat/completions", context.api.chat_body(messages, 1))
    if not 400 <= response.status_code < 500:
        raise CheckFailed(f"answered {response.status_code}, expected 4xx")
    return f"{response.status_code}"


def prompt_as_trained(context: Context) -> str:
    """The server's chat template gives the model the tokens that training put before the answer, one for one."""
    if not context.settings.template:
        raise CheckSkipped("training's template is not known")
    if not context.model:
        raise CheckSkipped("no model folder was given")
    told = {prompt.id: (prompt, reply.token_ids[0]) for prompt, reply in context.replies if reply.token_ids}
    if not told:
        raise CheckSkipped("the server returned no token ids (vLLM does since 0.10.2)")
    for prompt, given in (told[prompt.id] for prompt in context.prompts if prompt.id in told):
        allowed = expected_prompt(prompt, context.model.path, context.settings.template)
        if any(given == ids[: len(given)] and len(given) >= shortest for ids, shortest in allowed):
            continue
        ids = allowed[0][0]
        at = next((i for i, (one, two) in enumerate(zip(given, ids, strict=False)) if one != two), len(given))
        raise CheckFailed(
            f"the prompt {prompt.id} differs from template {context.settings.template} at token {at}: "
            f"served …{given[max(0, at - 3) : at + 5]}, trained …{ids[max(0, at - 3) : at + 5]}"
        )
    return f"{len(told)} prompts equal {context.settings.template}, token for token"


def _same(first: Reply, second: Reply, what: str) -> str:
    """Compare two greedy answers; see SAME_CHARACTERS."""
    one, two = f"{first.reasoning}\0{first.answer}", f"{second.reasoning}\0{second.answer}"
    if one == two:
        return f"equal, {len(one) - 1} characters"
    equal = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    if equal == min(len(one), len(two)):
        raise CheckFailed(f"{what} has {len(two) - 1} characters, the beginning of the first or more: {len(one) - 1}")
    if equal < SAME_CHARACTERS:
        near = slice(max(0, equal - 20), equal + 20)
        raise CheckFailed(f"{what} differs at character {equal}: {one[near]!r} against {two[near]!r}")
    return f"equal for {equal} characters"
