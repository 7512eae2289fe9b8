"""The answer after the reasoning, and how answers are compared. No package is needed here but the client's."""

import re
import unicodedata

from .api import Reply

BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def final_answer(reply: Reply, reasoning_parser: str | None) -> str:
    """The answer without reasoning; empty where reasoning opened and never closed.

    Without a parser reasoning is part of the text, and its opening tag may be part of the prompt, as in R1's template.
    """
    if reasoning_parser:
        return reply.answer
    _, closed, rest = reply.answer.rpartition("</think>")
    if closed:
        return rest
    return "" if "<think>" in reply.answer else reply.answer


def normalised(text: str) -> str:
    """Text as ``matches`` compares it; a full stop at the end does not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").strip()
