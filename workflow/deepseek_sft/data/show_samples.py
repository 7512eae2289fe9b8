"""Samples on the terminal: what is trained, and every control token, visible."""

from pathlib import Path

from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from ..printable import visible
from .encoding import load_encoder
from .samples import Sample
from .tokenizer_files import tokenizer_text
from .tokens import NO_LOSS

TRAINED = "bold green"
PROMPT = "dim"
CONTROL = "reverse"


def show(samples: list[Sample], tokenizer: Path, template: str, console: Console | None = None) -> None:
    """Print samples: trained tokens green, the rest dim, control tokens reversed."""
    console = console or Console(soft_wrap=True, highlight=False)
    whole = Tokenizer.from_str(tokenizer_text(tokenizer))
    control = {number: name for name, number in load_encoder(tokenizer, template).control.items()}
    console.print(Text.assemble("legend: ", ("trained", TRAINED), " ", ("prompt", PROMPT), " ", ("control", CONTROL)))
    for sample in samples:
        trained = int((sample.labels != NO_LOSS).sum())
        cut = ", truncated" if sample.truncated else ""
        console.rule(
            Text(f"{visible(sample.id)}: {len(sample.input_ids)} tokens, {trained} trained{cut}"), align="left"
        )
        console.print(highlighted(sample, whole, control))


def highlighted(sample: Sample, tokenizer: Tokenizer, control: dict[int, str]) -> Text:
    """A sample as styled text. Runs of one style are decoded together: a character can span several tokens."""
    text = Text()
    run: list[int] = []
    run_style = ""

    def end_run() -> None:
        if run:
            text.append(visible(tokenizer.decode(run, skip_special_tokens=False)), run_style)
            run.clear()

    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        style = TRAINED if label != NO_LOSS else PROMPT
        if token in control:
            end_run()
            text.append(control[token], f"{CONTROL} {style}")
            continue
        if style != run_style:
            end_run()
            run_style = style
        run.append(token)
    end_run()
    return text
