"""Items of a JSON array read from blocks of bytes, holding one item and a block at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from .lines import LARGEST_RECORD

SPACE = re.compile(r"[ \t\r\n]*")


class ArrayError(Exception):
    """The text is not one whole JSON array.

    Args:
        problem: what is wrong.
        items: number of items read before.
    """

    def __init__(self, problem: str, items: int):
        super().__init__(problem)
        self.items = items


class _Buffer:
    """Decoded text that grows on demand; what lies before ``position`` is dropped."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks = blocks
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.position = 0

    def more(self) -> bool:
        """Read as much again as is held, so that long items cost linear time; False at the end."""
        old = self.text[self.position :]
        new: list[str] = []
        wanted = max(1, len(old))
        for block in self.blocks:
            new.append(self.decoder.decode(block))
            wanted -= len(new[-1])
            if wanted <= 0:
                break
        else:
            new.append(self.decoder.decode(b"", final=True))
        self.text, self.position = "".join([old, *new]), 0
        return len(self.text) > len(old)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.position = SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]  # matches always
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def value(self, limit: int) -> tuple[Any, int]:
        """Decode the JSON value at the position; it, and the number of its characters.

        It is taken only once a comma or bracket follows: the text read so far may end within a number (1 of 1.5).
        """
        while True:
            try:
                item, end = json.JSONDecoder().raw_decode(self.text, self.position)
                follower = SPACE.match(self.text, end).end()  # type: ignore[union-attr]  # matches always
                if self.text[follower : follower + 1] in (",", "]"):
                    size, self.position = end - self.position, end
                    return item, size
                problem = "a comma or the closing bracket is missing"
            except json.JSONDecodeError as error:
                problem = error.msg
            if len(self.text) - self.position > limit:
                raise ValueError(f"the next one has more than {limit:,} characters, or does not end")
            if not self.more():
                raise ValueError(problem)


def sized_items(blocks: Iterator[bytes], limit: int = LARGEST_RECORD) -> Iterator[tuple[Any, int]]:
    """Yield the items of a UTF-8 JSON array, each with the number of its characters.

    Args:
        limit: characters of an item that are read before it counts as damaged.

    Raises:
        ArrayError: not one whole array; items before the damage have been yielded.
    """
    buffer = _Buffer(blocks)
    items = 0
    try:
        if buffer.peek() != "[":
            raise ValueError("no opening bracket")
        buffer.position += 1
        mark = ","
        if buffer.peek() == "]":
            mark = "]"
            buffer.position += 1
        while mark == ",":
            if not buffer.peek():
                raise ValueError("the file ends inside the array")
            item, size = buffer.value(limit)
            items += 1
            yield item, size
            mark = buffer.peek()
            buffer.position += 1
        if buffer.peek():
            raise ValueError("text follows the closing bracket")
    except UnicodeDecodeError as error:
        raise ArrayError(f"not UTF-8 ({error.reason})", items) from None
    except RecursionError:
        raise ArrayError("nested too deeply", items) from None
    except ValueError as error:
        raise ArrayError(str(error), items) from None
