"""Which tokens of the chat template must not show up as text in an answer: those of the served folder.

Of its tokenizer's control tokens these count: those in bars (``<｜User｜>``, ``<|im_end|>``), and those in brackets
that the chat template names. Others, such as ``<s>`` or ``[PAD]``, may well be what an answer speaks of. Tags of
thinking are judged apart: without a parser they belong into the text.
"""

import functools
import re
from pathlib import Path

from ..data.base_template import read_chat_template
from ..data.messages import THINK_CLOSE, THINK_OPEN
from ..data.tokenizer_files import CONFIG, control_tokens, vocabulary_file

IN_BARS = re.compile(r"<｜[^｜<>]{1,40}｜>|<\|[^|<>\s]{1,40}\|>")
MARKS = ("<", "[")  # with which names of control tokens begin that are no words
DEEPSEEK = r"<｜[^｜<>]{1,40}｜>"  # bars that no text has by itself: also a token that this tokenizer lacks is a leak


@functools.lru_cache(maxsize=4)
def of_folder(folder: Path | None) -> re.Pattern[str]:
    """Finds such tokens in text; without a folder that has a tokenizer, all that is in bars.

    Raises:
        BadInputError: the folder's tokenizer or chat template cannot be read.
    """
    if folder is None or not (vocabulary_file(folder).exists() and (folder / CONFIG).exists()):
        return IN_BARS
    control = control_tokens(folder)
    chat = read_chat_template(folder)
    named = "".join(text for _, text in chat.named) if chat else ""
    counted = [name for name in control if IN_BARS.fullmatch(name) or (name[:1] in MARKS and name in named)]
    counted = sorted({*counted} - {THINK_OPEN, THINK_CLOSE}, key=len, reverse=True)
    return re.compile("|".join([DEEPSEEK, *map(re.escape, counted)]))
