"""Whether a template of ours is the one that the base is served with: both render the same conversations.

For every answer of a handful of conversations, the ids that training puts before it are compared with those that the
base's own chat template gives a server. Two differences are none: a prompt that already opens the answer as it is
trained (R1's later ``<think>\\n``), and arguments of calls given to the template as text or as an object.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInputError, GateError
from .base_template import ChatTemplate, TemplateError, pieces_of_text
from .chat_templates import AUTO, BASE, CALLS_BEGIN, END, NO_LOSS, TEMPLATES, Place
from .encoding import Encoder, load_encoder
from .messages import THINK_OPEN, normalise, split_reasoning
from .samples import Settings, make_samples, to_reply

LONGEST = 1 << 20
SHOWN = 3  # differences in a message
AROUND = 60  # characters shown of what is the same
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city: <now> & later",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "time", "description": "时间", "parameters": {"type": "object"}}},
]


@dataclass(frozen=True)
class Conversation:
    """A conversation to compare.

    Args:
        name: what is special about it.
        messages: in the form of ``train.jsonl``.
        tools: definitions given beside it.
    """

    name: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @property
    def about_tools(self) -> bool:
        """Whether only records with tools look like it."""
        return bool(self.tools) or any("tool_calls" in message for message in self.messages)


@dataclass(frozen=True)
class Difference:
    """A prompt that differs.

    Args:
        place: which one, in words.
        about_tools: whether only records with tools look like it.
        base: the text before the answer by the base's chat template, or why there is none.
        ours: the ids before the answer in training.
    """

    place: str
    about_tools: bool
    base: str
    ours: list[int]


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Args:
        template: the template to render with; one of ``TEMPLATES``.
        compared: prompts that were compared; 0 where the base has no chat template.
        notes: what a person should know, one sentence each.
        tools_differ: records with calls or definitions of tools must not be rendered with it, and why.
        agrees: whether all prompts that were compared are the base's.
    """

    template: str
    compared: int
    notes: tuple[str, ...] = ()
    tools_differ: str = ""
    agrees: bool = True


def conversations() -> list[Conversation]:
    """What is compared."""

    def ask(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    def say(text: str, reasoning: str = "", *calls: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
        made = [{"type": "function", "function": {"name": n, "arguments": f'{{"city": "{n} é"}}'}} for n in calls]
        return message | ({"tool_calls": made} if calls else {})

    def out(text: str) -> dict[str, Any]:
        return {"role": "tool", "content": text}

    system = {"role": "system", "content": "Be brief.\n\nBe kind."}
    question, more = ask("What is 2 + 3?\nShow it."), ask(" And 中文? ")
    plain, thought = say("5."), say("It is **5**.\n\nSure.", "2 and 3\n\nmake 5")
    one, two, other = say("", "", "weather"), say("I look.", "", "weather", "time"), say("", "", "time")
    found = [
        Conversation("plain", [question, plain, more, plain]),
        Conversation("with a system text", [system, question, plain, more, plain]),
        Conversation("with reasoning", [question, thought]),
        Conversation("with reasoning in the history", [system, question, thought, more, thought, question, thought]),
        Conversation("without thinking after thinking", [question, thought, more, plain]),
        Conversation("one call", [system, question, one, out("21"), plain]),
        Conversation("parallel calls and outputs", [question, two, out("21"), out("12:00"), plain]),
        Conversation("a second round of calls", [question, one, out("21"), other, out("12:00"), plain, more, plain]),
        Conversation("a call after a second question", [question, one, out("21"), plain, more, two, out("8"), out("")]),
        Conversation(
            "reasoning around a call", [question, say("", "Look", "weather"), out("21"), thought, more, plain]
        ),
        Conversation("tools given", [question, plain, more, plain], TOOLS),
        Conversation("tools given beside a system text", [system, question, one, out("21"), plain], TOOLS),
    ]
    found[8].messages.append(plain)
    return [Conversation(c.name, normalise(c.messages), c.tools) for c in found]


def compare(encoder: Encoder, template: str) -> tuple[list[Difference], int, bool]:
    """Compare one of our templates with the chat template of the encoder's folder.

    Returns:
        The differences, the number of prompts compared, and whether the base's prompt opens the reasoning of answers
        that have none.
    """
    chat = encoder.chat_template
    if chat is None:
        return [], 0, False
    opened = encoder_ids(encoder, f"{THINK_OPEN}\n")
    differences: list[Difference] = []
    compared, forced = 0, False
    for conversation in conversations():
        for end, prompt, sample in _prompts(conversation, encoder, template):
            compared += 1
            place = f"{conversation.name}: before message {end + 1}"
            reasoned = conversation.messages[end]["content"].startswith(THINK_OPEN)
            given, problem = _of_base(chat, conversation, end, template, reasoned)
            ids = [encoder_ids(encoder, text) for text in given]
            if any(_opens(one, prompt, sample) for one in ids):
                continue
            if not reasoned and any(one == prompt + opened for one in ids):
                forced = True
                continue
            base = given[0] if given else f"(the template refuses it: {problem})"
            differences.append(Difference(place, conversation.about_tools, base, prompt))
    return differences, compared, forced


def check(encoder: Encoder, template: str, policy: str = "fail") -> Verdict:
    """Settle the template to render with, or stop.

    Args:
        template: one of ``TEMPLATES``, or ``auto``.
        policy: what a difference does, ``fail`` or ``warn``.

    Raises:
        GateError: the template is not the base's, and ``policy`` is ``fail``.
        BadInputError: ``auto``, and none fits.
    """
    chat = encoder.chat_template
    if template == BASE:
        return _check_base(encoder)
    if chat is None:
        if template == AUTO:
            raise BadInputError(
                f"data.template: auto: {encoder.folder} has no chat template to choose by",
                f"name the template: {', '.join(TEMPLATES)}",
            )
        note = (
            f"template {template} cannot be compared with the base's: {encoder.folder} has no chat template; the model "
            "must be served with the same one"
        )
        return Verdict(template, 0, (note,), agrees=False)
    found = {name: compare(encoder, name) for name in TEMPLATES}
    ranks = {name: (sum(not d.about_tools for d in found[name][0]), len(found[name][0])) for name in TEMPLATES}
    best = min(TEMPLATES, key=ranks.__getitem__)
    if template == AUTO:
        if ranks[best][0]:
            raise BadInputError(
                f"data.template: auto: no template fits {chat.source}\n{_shown(encoder, best, found[best])}",
                "serve with a chat template of a DeepSeek release, or name the template of training and set "
                "data.on_template_difference: warn",
            )
        notes = [f"data.template: auto takes {best}, the template of {chat.source}"]
        template = best
    else:
        notes = []
    differences, compared, forced = found[template]
    if forced:
        notes.append(
            f"{chat.source} opens the reasoning in every prompt: answers that are trained without reasoning follow "
            "another prompt than serving makes"
        )
    if not differences:
        return Verdict(template, compared, tuple(notes), agrees=not forced)
    problem = (
        f"template {template} is not that of the base, {chat.source}\n{_shown(encoder, template, found[template])}"
    )
    way_out = "if the model will be served with another chat template, set data.on_template_difference: warn"
    if policy == "warn":
        return Verdict(template, compared, (*notes, problem), agrees=False)
    if ranks[best] < ranks[template] and not ranks[best][0]:
        fits = "gives the base's prompts" if not ranks[best][1] else "comes nearest"
        raise GateError(problem, f"set data.template: {best}, which {fits} (or auto); {way_out}")
    if ranks[template][0]:
        raise GateError(problem, f"no template fits ({best} comes nearest); {way_out}")
    notes.append(f"{problem}\n  no template fits there: records with tools are refused (data.on_template_difference)")
    return Verdict(template, compared, tuple(notes), tools_differ=problem, agrees=False)


def _check_base(encoder: Encoder) -> Verdict:
    """Whether the base's own template renders conversations so that what is trained is known.

    Raises:
        BadInputError: it does not, not even plain ones.
    """
    given = conversations()
    try:
        made = make_samples(
            [{"id": one.name, "messages": one.messages, "tools": one.tools} for one in given],
            encoder,
            Settings(BASE, LONGEST),
        )
    except TemplateError as error:
        raise BadInputError(
            f"data.template: base: {encoder.folder}: {error}", f"name one of ours instead: {', '.join(TEMPLATES)}"
        ) from None
    problems = {one.name: found.rejects[0][2] for one, found in zip(given, made, strict=True) if found.rejects}
    if given[0].name in problems:
        raise BadInputError(
            f"data.template: base: {encoder.folder}: {problems[given[0].name]}",
            f"name one of ours ({', '.join(TEMPLATES)}), or train and serve with another chat template",
        )
    notes = [f"data.template: base rejects conversations such as '{name}': {why}" for name, why in problems.items()]
    return Verdict(BASE, sum(len(one.samples) for one in made), tuple(notes))


def check_folders(folders: list[Path], template: str, policy: str) -> list[str]:
    """Check the template against each folder: the tokenizer's, and the base's, whose chat template is served.

    Returns:
        The notes.

    Raises:
        As ``check``; also BadInputError where ``auto`` finds another template in each.
    """
    first, *others = folders
    without = [folder for folder in others if not (folder / "tokenizer_config.json").exists()]
    folders = [first, *(folder for folder in others if folder not in without)]
    verdicts = [check(load_encoder(folder, template), template, policy) for folder in folders]
    names = {str(folder): verdict.template for folder, verdict in zip(folders, verdicts, strict=True)}
    if len(set(names.values())) > 1:
        raise BadInputError(
            f"data.template: auto: the chat templates of tokenizer and base differ: {names}", "name the template"
        )
    notes = [note for verdict in verdicts for note in verdict.notes]
    notes += [f"the template cannot be compared with {folder}: it has no tokenizer_config.json" for folder in without]
    return list(dict.fromkeys(notes))


def settle(template: str, folder: Path) -> str:
    """The name of the template, ``auto`` resolved by the chat template of a folder."""
    return check(load_encoder(folder, AUTO), AUTO).template if template == AUTO else template


def encoder_ids(encoder: Encoder, text: str) -> list[int]:
    """Ids of rendered text as a server's tokenizer reads it: control tokens by name."""
    segments = encoder.encode([pieces_of_text(text, encoder.control)])[0]
    return [int(number) for segment in segments for number in segment.ids]


def _prompts(conversation: Conversation, encoder: Encoder, template: str) -> Iterator[tuple[int, list[int], list[int]]]:
    """Each answer's message, the ids before it in training, and all ids; not those without a place in the template."""
    for end, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        messages = [
            m | {"loss": number == end} if m["role"] == "assistant" else m
            for number, m in enumerate(conversation.messages[: end + 1])
        ]
        record = {"id": "", "messages": messages, "tools": conversation.tools}
        made = make_samples([record], encoder, Settings(template, LONGEST))[0]
        if any(reason != "tool_reasoning" for _, reason, _ in made.rejects):
            yield end, [], []
        for sample in made.samples:
            ids = sample.input_ids.tolist()
            yield end, ids[: (sample.labels != NO_LOSS).tolist().index(True)], ids


def _of_base(
    chat: ChatTemplate, conversation: Conversation, end: int, template: str, thinking: bool
) -> tuple[list[str], str]:
    """Prompts that the base's template may give (arguments as text, as an object), or why it gives none."""
    given, problem = [], ""
    for as_object in (False, True):
        before = ["", *(message["role"] for message in conversation.messages)]
        messages = [
            _as_served(message, before[number] == "tool", template, as_object)
            for number, message in enumerate(conversation.messages[:end])
        ]
        try:
            text = chat.render(
                messages, tools=conversation.tools, prompt=True, thinking=thinking, enable_thinking=thinking
            )
            given.append(text)
        except TemplateError as error:
            problem = problem or str(error)
    return given, problem


def _as_served(message: dict[str, Any], after_tool: bool, template: str, as_object: bool) -> dict[str, Any]:
    """A message as a request holds it: what the model wrote is its content, its calls are parsed."""
    shown = {name: value for name, value in message.items() if name != "loss"}
    if message["role"] != "assistant":
        return shown
    reply = to_reply(message)
    pieces = TEMPLATES[template].reply(reply, Place(after_tool)) or []
    calls = next((i for i, piece in enumerate(pieces) if piece.control and piece.text == CALLS_BEGIN), len(pieces))
    written = "".join(p.text for p in pieces[:calls] if p.generated and p.text != END)
    if not pieces:
        written = split_reasoning(message["content"])[1]
    if "tool_calls" in message and as_object:
        shown["tool_calls"] = [
            call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return shown | {"content": written}


def _opens(given: list[int], prompt: list[int], sample: list[int]) -> bool:
    """Whether a prompt is that of training, or goes on as the trained answer begins."""
    return len(given) >= len(prompt) > 0 and given == sample[: len(given)]


def _text(encoder: Encoder, ids: list[int]) -> str:
    names = {number: name for name, number in encoder.control.items()}
    text, run = "", []
    for number in [*ids, -1]:
        if number in names or number == -1:
            text += encoder.text.decode(run, skip_special_tokens=False) if run else ""
            text, run = text + names.get(number, ""), []
        else:
            run.append(number)
    return text


def _shown(encoder: Encoder, template: str, found: tuple[list[Difference], int, bool]) -> str:
    """Differences side by side, cut to where they begin."""
    differences, compared, _ = found
    lines = [f"  {len(differences)} of {compared} prompts differ"]
    for one in differences[:SHOWN]:
        texts = one.base, _text(encoder, one.ours)
        common = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        start = max(0, common - AROUND) if common > 2 * AROUND else 0
        base, ours = ("…" * bool(start) + text[start:].replace("\n", "\\n") for text in texts)
        width = max(len("base"), len(template))
        lines += [f"  {one.place}", f"    {'base':{width}}  {base}", f"    {template:{width}}  {ours}"]
    if len(differences) > SHOWN:
        rest = dict.fromkeys(one.place.partition(":")[0] for one in differences[SHOWN:])
        lines.append(f"  and {len(differences) - SHOWN} more: {', '.join(rest)}")
    return "\n".join(lines)
