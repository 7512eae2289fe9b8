"""Text whose spellings of control tokens are held apart while a template works on it."""

import re
from collections.abc import Collection

from .template_child import BEGIN, END
from .template_process import TemplateError

HELD = tuple(chr(0xF5E20 + number) for number in range(16))  # one for each first character of control tokens


class Hold:
    """Keeps control tokens that people typed apart from the template's."""

    def __init__(self, control: Collection[str]):
        firsts = sorted({name[0] for name in control if name})
        if len(firsts) > len(HELD):
            raise TemplateError("control tokens begin with too many different characters")
        self._of = dict(zip(firsts, HELD, strict=False))
        names = sorted(filter(None, control), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names))) if names else None
        self._back = str.maketrans({held: first for first, held in self._of.items()})

    def __call__(self, text: str) -> str:
        """Text in which no control token is spelled.

        Raises:
            TemplateError: it holds a character that is needed for this.
        """
        if any(mark in text for mark in (*HELD, BEGIN, END)):
            raise TemplateError("the text holds a private character that is needed to keep it apart")
        return self._names.sub(lambda found: self._of[found[0][0]] + found[0][1:], text) if self._names else text

    def back(self, text: str) -> str:
        """The text as it was typed."""
        return text.translate(self._back)
