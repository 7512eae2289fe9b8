"""What the names of fields mean, at every level of a record, and which fields nothing used.

A field is read as what its name means (``RECORD``, ``MESSAGE``, ``PART``), rejected with its record (preference data,
pictures), or counted by its path. Where a name says that it carries training, reasoning or system text, and its value
could be just that, the count is ``unclear``: the stage fails until ``data.fields`` says what the field means.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LOSS, NOT_LOSS, REASONING, SYSTEM, TOOLS, IGNORE = "loss", "not loss", "reasoning", "system", "tools", "ignore"
MEANINGS = (LOSS, NOT_LOSS, REASONING, SYSTEM, TOOLS, IGNORE)  # what data.fields may say
MEDIA, PREFERENCE, VERDICT, SPANS = "media", "preference", "verdict", "spans"  # what only we say

_LOSS = dict.fromkeys(("loss", "weight", "train", "training", "trainable", "loss_scale"), LOSS)
_REASONING = dict.fromkeys(
    (
        *("reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking", "thinking_content"),
        *("think", "think_content", "thought", "thoughts", "thought_content", "chain_of_thought"),
    ),
    REASONING,
)
RECORD = {
    **_LOSS,
    **_REASONING,
    **dict.fromkeys(("system", "system_prompt", "system_message"), SYSTEM),
    **dict.fromkeys(("tools", "functions"), TOOLS),
    **dict.fromkeys(("label", "kto_tag"), VERDICT),
    "train_detail": SPANS,
}
MESSAGE = {**_LOSS, **_REASONING, "train_detail": SPANS}
PART = _LOSS

_MEDIA = re.compile(r"(image|picture|video|audio)s?(_(url|uri|path|file|data|base64)s?)?")
_PREFERENCE = re.compile(r"chosen(_.*)?|rejected(_.*)?|(non_|dis|un)preferred(_.*)?")
# Words of a name that say it carries training, reasoning or system text.
_TELLING = re.compile(
    r"(?:^|_)(?:(?:un|non?|not)?train(?:s|ed|ing|able)?|(?:no)?loss(?:es)?|(?:un)?mask(?:s|ed|ing)?|(?:un)?supervis\w*"
    r"|backprop\w*|reasoning\w*|reasoned|think(?:s|ing)?|thoughts?|cot|rationales?|scratchpad|sys|system"
    r"|developer_(?:prompt|message|instructions?))(?=_|$)"
)
_NEGATED = re.compile(
    r"(?:^|_)(?:no|not|non|un|dont|never|without|skip|ignore|exclude|omit|drop|disable)(?:s|d|ed)?(?=_|$)"
)
# Side notes whose names only sound so.
_SIDE_NOTES = {
    "reasoning_language", "reasoning_effort", "reasoning_tokens", "reasoning_length", "thinking_tokens",
    "thinking_budget", "system_fingerprint", "reasoning_content_len", "cot_type",
}  # fmt: skip
# Values of a switch: text in a reasoning field that is no reasoning.
_SWITCH = {
    "on", "off", "true", "false", "yes", "no", "none", "null", "auto", "enabled", "disabled", "low", "medium", "high",
    "0", "1",
}  # fmt: skip
_CONTAINERS = (dict, list, tuple)
SHOWN_NAME = 80  # characters of a name in a path


@functools.lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """A field's name in small letters, words joined by underscores: ``reasoningContent`` → ``reasoning_content``."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_")


@functools.lru_cache(maxsize=4096)
def is_telling(name: str) -> bool:
    """Whether a name says that the field carries training, reasoning or system text."""
    return plain_name(name) not in _SIDE_NOTES and bool(_TELLING.search(plain_name(name)))


def likely_meaning(name: str) -> str:
    """What a telling name most likely means: a suggestion for people, never taken without them."""
    plain = plain_name(name)
    found = _TELLING.search(plain)
    word = found[0].strip("_") if found else ""
    if not word or plain in _REASONING:  # a reasoning field whose value is a switch
        return IGNORE
    if word.startswith(("sys", "developer")):
        return SYSTEM
    kind = re.match("(un|non?|not)?(train|loss|mask|superv|backprop)", word)
    if not kind:
        return REASONING
    turns = [kind[1], kind[2] == "mask", _NEGATED.search(plain[: found.start() + 1])]
    return NOT_LOSS if sum(map(bool, turns)) % 2 else LOSS


def empty(value: Any) -> bool:
    """Whether a value holds nothing: null, empty text, or containers of such alone."""
    if not isinstance(value, _CONTAINERS):
        return value is None or value == ""
    waiting: list[Any] = [value]
    while waiting:  # no recursion: records may be nested as deeply as JSON is read
        inner = waiting.pop()
        for one in inner.values() if isinstance(inner, dict) else inner:
            if isinstance(one, _CONTAINERS):
                waiting.append(one)
            elif one is not None and one != "":
                return False
    return True


def is_flag_or_text(value: Any) -> bool:
    """Whether a value is a boolean, 0 or 1, or text: what a telling name would mean seriously."""
    return (isinstance(value, str) and bool(value.strip())) or (isinstance(value, int | float) and value in (0, 1))


def is_switch(value: Any) -> bool:
    """Whether the value of a reasoning field turns reasoning on or off rather than being some."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _SWITCH)


@dataclass(frozen=True)
class Vocabulary:
    """Meanings of names, ours and those of ``data.fields``, which come first.

    Args:
        given: name or path (``messages[].mask``) → one of ``MEANINGS``. A name holds at every level.
    """

    given: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def _tables(self) -> dict[str, dict[str, str]]:
        names = {name: meaning for name, meaning in self.given.items() if "[]" not in name and "." not in name}
        inside = {
            path.partition("[].")[2]: meaning
            for path, meaning in self.given.items()
            if "[]." in path and path.count("[].") == 1 and "." not in path.partition("[].")[2]
        }
        return {"record": RECORD | names, "message": MESSAGE | names | inside, "part": PART | names}

    def of_record(self, name: str) -> str:
        """What a field beside the messages means; empty if that is not known."""
        return self._of("record", name)

    def of_message(self, name: str) -> str:
        """What a field of a message means; empty if that is not known."""
        return self._of("message", name)

    def of_part(self, name: str) -> str:
        """What a field of a part of a message's content means; empty if that is not known."""
        return self._of("part", name)

    def _of(self, level: str, name: str) -> str:
        table = self._tables[level]
        meaning = table.get(name)
        if meaning is None:
            plain = plain_name(name)
            meaning = table.get(plain, "")
            if not meaning and level != "part":
                if _MEDIA.fullmatch(plain):
                    meaning = MEDIA
                elif level == "record" and _PREFERENCE.fullmatch(plain):
                    meaning = PREFERENCE
            if len(table) < 4096:  # names recur in every record
                table[name] = meaning
        return meaning

    def ignores(self, path: str) -> bool:
        """Whether ``data.fields`` says to leave a field out of account."""
        return self.given.get(path) == IGNORE or self.given.get(path.rpartition(".")[2]) == IGNORE


PLAIN = Vocabulary()


class Leftovers:
    """Fields of one record that nothing used: path → whether they are unclear.

    Args:
        vocabulary: what to ignore.
    """

    def __init__(self, vocabulary: Vocabulary = PLAIN):
        self.vocabulary = vocabulary
        self.paths: dict[str, bool] = {}
        self.prefix = ""  # the list of messages that is being read, such as messages[].

    def add(self, name: str, value: Any, *, known: bool = False, unclear: bool = False) -> None:
        """Count a field that is not used, unless it is empty.

        Args:
            name: below the prefix.
            value: of the field.
            known: its name has a meaning that does not apply here, so it never is unclear.
            unclear: the stage must not go on without knowing what it means.
        """
        if empty(value):
            return
        path = self.prefix + (name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…")
        if self.vocabulary.given and self.vocabulary.ignores(path):
            return
        last = name.rpartition(".")[2]
        unclear = unclear or (not known and is_telling(last) and is_flag_or_text(value))
        self.paths[path] = self.paths.get(path, False) or unclear
        if isinstance(value, dict) and not known:  # named as well, lest metadata hide it
            for inner, one in value.items():
                if is_telling(inner) and is_flag_or_text(one):
                    self.paths.setdefault(f"{path}.{inner[:SHOWN_NAME]}", False)
