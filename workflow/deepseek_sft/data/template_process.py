"""Chat templates rendered in a process of their own, with bounds: an endless loop ends in a sentence."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("template_child.py")
MEMORY = 1 << 30  # bytes of addresses
SECONDS = 10  # of processor time for one rendering
LARGEST, TIMES = 1 << 20, 8  # characters of a rendering: so many, and so many times what it was given


class TemplateError(Exception):
    """The chat template refuses a conversation, or has no place for definitions of tools."""


class TemplateSyntaxError(Exception):
    """It is no Jinja template."""


class _Child:
    def __init__(self) -> None:
        self.owner = os.getpid()
        command = [sys.executable, "-I", str(PROGRAM), str(MEMORY), str(SECONDS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, line: bytes) -> bytes:
        """The answer; empty where the process has ended."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
        except OSError:
            return b""
        return self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        self.process.wait()


_lock = threading.Lock()
_child: list[_Child] = []


def _ask(request: dict[str, Any]) -> str:
    line = json.dumps(request).encode()
    with _lock:
        if _child and _child[0].owner != os.getpid():
            _child.clear()  # of the process that this one was forked from
        if not _child:
            _child.append(_Child())
        answer = _child[0].ask(line)
        if not answer.endswith(b"\n"):
            _child.pop().end()
            raise TemplateError(
                f"rendering ended: it takes more than {SECONDS} s of processor time, or too much memory"
            )
    found = json.loads(answer)
    if "syntax" in found:
        raise TemplateSyntaxError(found["syntax"])
    if "error" in found:
        raise TemplateError(found["error"])
    return found["text"]


def compile_only(text: str) -> None:
    """
    Raises:
        TemplateSyntaxError: it is no Jinja template.
        TemplateError: compiling it takes too much.
    """
    _ask({"text": text})


def render(text: str, variables: dict[str, Any]) -> str:
    """
    Raises:
        TemplateError: the template refuses its variables, fails, or takes too much.
    """
    most = LARGEST + TIMES * len(json.dumps(variables, ensure_ascii=False))
    return _ask({"text": text, "variables": variables, "most": most})
