"""Render train.jsonl with a DeepSeek chat template, tokenise it, and write token files that training memory-maps.

Only answers of turns with loss, their reasoning included, and the end-of-sentence token after each carry labels.
Control tokens typed by people stay text. --show N prints the first samples, trained part highlighted, and writes
nothing.

    tokenize_data.py --input train.jsonl --tokenizer DIR --template deepseek-r1 --max-length 32768 --output tokens \\
                     --rejects tokens_rejects.jsonl --statistics statistics.json --receipt receipts/tokenize_data.json
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import _bootstrap  # noqa: F401
import _single_threaded  # noqa: F401

from deepseek_sft import cli, files, receipts
from deepseek_sft.data.samples import Settings
from deepseek_sft.data.tokenization import Outputs, first_samples, tokenize, tokenize_held_out
from deepseek_sft.data.tokenizer_files import vocabulary_file
from deepseek_sft.settings import options
from deepseek_sft.settings.data import Data
from deepseek_sft.settings.field_types import keys

HALF = 0.5  # of a row: below it two samples share one on average
HELD_OUT_TOKENS = "held_out_tokens"  # beside the token folder
WRITTEN = ("output", "rejects", "statistics", "receipt")


def parse() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--input", type=Path, required=True, help="train.jsonl of prepare_data")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json and its config")
    options.add(parser, Data, "template", "on_template_difference", "max_length", "history_reasoning", "on_too_long")
    parser.add_argument("--pack", action=argparse.BooleanOptionalAction, default=False, help=keys(Data)["pack"].meaning)
    parser.add_argument("--held-out", type=Path, help="held_out.jsonl of prepare_data: tokens for validation")
    parser.add_argument("--output", type=Path, help="token folder")
    parser.add_argument("--rejects", type=Path, help="samples left out, with reasons")
    parser.add_argument("--statistics", type=Path, help="lengths, shares, rejects by reason")
    parser.add_argument("--receipt", type=Path, help="receipt, written last")
    parser.add_argument("--workers", type=int, default=1, help="processes; the result is the same for any number")
    parser.add_argument("--show", type=int, metavar="N", help="print the first N samples and exit")
    arguments = parser.parse_args()
    missing = [f"--{name}" for name in WRITTEN if getattr(arguments, name) is None]
    if missing and arguments.show is None:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return arguments


def main() -> None:
    arguments = parse()
    settings = Settings(
        arguments.template, arguments.max_length, arguments.history_reasoning, arguments.on_too_long == "truncate"
    )
    if arguments.show is not None:
        from deepseek_sft.data.show_samples import show

        samples = first_samples(arguments.input, arguments.tokenizer, settings, arguments.show)
        show(samples, arguments.tokenizer, arguments.template)
        return
    files.require_writable(arguments.output, arguments.rejects, arguments.statistics, arguments.receipt)
    arguments.receipt.unlink(missing_ok=True)  # a receipt never speaks of a run that is being replaced
    outputs = Outputs(arguments.output, arguments.rejects, arguments.statistics)
    figures = tokenize(
        *(arguments.input, arguments.tokenizer, settings, outputs),
        pack=arguments.pack,
        workers=arguments.workers,
        on_template_difference=arguments.on_template_difference,
    )
    validated = {}
    if arguments.held_out:
        settled = dataclasses.replace(settings, template=figures["template"])
        place = arguments.output.with_name(HELD_OUT_TOKENS)
        figures["held_out"] = tokenize_held_out(
            *(arguments.held_out, arguments.tokenizer, settled, place), pack=arguments.pack, workers=arguments.workers
        )
        validated = {HELD_OUT_TOKENS: str(place)}
    receipts.write(
        arguments.receipt,
        "tokenize_data",
        inputs={
            "data": receipts.input_entry(arguments.input),
            "tokenizer": receipts.input_entry(vocabulary_file(arguments.tokenizer)),
        },
        settings={
            "template": figures["template"],
            "max_length": arguments.max_length,
            "history_reasoning": arguments.history_reasoning,
            "on_too_long": arguments.on_too_long,
            "pack": arguments.pack,
        },
        result={
            "tokens": str(arguments.output),
            "rejects": str(arguments.rejects),
            "statistics": str(arguments.statistics),
        }
        | validated,
        figures=figures,
    )
    cli.say(
        f"{figures['samples']} samples, {figures['tokens']} tokens, {figures['trained_tokens']} of them trained; "
        f"{figures['rejected']} rejected"
    )
    mean, most = figures["mean_length"], arguments.max_length
    loose = not arguments.pack and mean < HALF * most
    cli.say(
        f"{figures['rows']} rows of {mean:,.0f} tokens on average, {mean / most:.1%} of {most}"
        + (": with data.pack several samples would share a row" if loose else "")
    )
    if held := figures.get("held_out"):
        cli.say(f"for validation: {held['samples']:,} samples, {held['trained_tokens']:,} tokens with loss")
    tell(figures)


def tell(figures: dict[str, Any]) -> None:
    """Print what the samples' texts deserve a warning for; the report repeats it."""
    if spelled := figures["answers_spelling_control_tokens"]:
        cli.say(
            f"warning: {spelled:,} trained answers spell control tokens ({figures['first_spelling']} first): trained "
            "as ordinary text; most often the data was decoded without skipping special tokens"
        )
    if lost := figures["records_with_tools_not_shown"]:
        cli.say(
            f"warning: {lost:,} records come with definitions of tools, which the base's chat template does not show: "
            "they are left out; write them into the system text where the model should see them"
        )


if __name__ == "__main__":
    cli.run(main)
