"""What data say reaches a terminal as text, never as a command to it."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from unit.data.helpers import TOKENIZER, assistant, run_script, user, write_lines

from deepseek_sft.data.samples import Settings
from deepseek_sft.data.show_samples import show
from deepseek_sft.data.tokenization import first_samples
from deepseek_sft.printable import visible

PROJECT = Path(__file__).resolve().parents[2]
ACTING = ["\x1b[2J", "\x1b]52;c;Y2FuYXJ5\x07", "\x1b]8;;http://x\x1b\\", "\x9b31m"]
ACTING += [*"\r\x08\x7f\x00\u202e\u2066"]


@pytest.mark.parametrize("text", ACTING)
def test_characters_that_a_terminal_obeys_are_shown(text):
    shown = visible(f"a{text}b")
    assert all(character.isprintable() for character in shown)
    assert shown != f"a{text}b"


def test_ordinary_text_of_every_script_stays():
    text = "é 中文 かな العربية עברית हिन्दी 🙂👩\u200d🚀\tand\na line"
    assert visible(text) == text


def test_samples_are_shown_without_what_a_terminal_would_obey(tmp_path):
    # train.jsonl may come from elsewhere: prepare_data is not the only thing that writes one.
    lines = [
        {"id": f"r\x1b]0;title\x07{n}", "messages": [user(f"q{text}"), assistant(f"a{text}", loss=True)]}
        for n, text in enumerate(ACTING)
    ]
    source = write_lines(tmp_path / "train.jsonl", lines)
    samples = first_samples(source, TOKENIZER, Settings("deepseek-r1", 512, "split", False), 20)
    assert len(samples) >= len(ACTING) - 1  # an answer that ends with a line end is none of its own
    stream = io.StringIO()
    show(samples, TOKENIZER, "deepseek-r1", Console(file=stream, color_system=None, width=200, soft_wrap=True))
    assert not [c for c in stream.getvalue() if not c.isprintable() and c != "\n"]


def test_messages_about_data_hold_nothing_that_a_terminal_would_obey(tmp_path):
    broken = {"mess\x1b]0;ages": 1, "role\u202e": 2}
    source = write_lines(tmp_path / "a\x1b[31m.jsonl", [broken])
    written = ["--output", tmp_path / "o", "--rejects", tmp_path / "r", "--receipt", tmp_path / "c"]
    done = run_script("prepare_data.py", "--source", source, *written)
    assert done.returncode == 2
    assert not [c for c in done.stdout + done.stderr if not c.isprintable() and c not in "\n\t"]


def test_every_message_goes_through_one_place():
    code = "from deepseek_sft import cli; cli.say('x\\x1b[2Jy')"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=PROJECT / "workflow", capture_output=True, text=True, check=True)
    assert done.stderr == "x\\x1b[2Jy\n"
