"""Read chats in any supported format and write one clean form of them: train.jsonl.

Every record ends either in --output or, with file, line, reason and message, in --rejects; the order is kept.
Assistant messages come out as <think>\\n{reasoning}\\n</think>\\n\\n{answer} with a boolean loss. docs/data.md lists
formats and rules.

    prepare_data.py --source chats.jsonl 'sharegpt=more/*.json.gz' --output train.jsonl --rejects rejects.jsonl \\
                    --receipt receipts/prepare_data.json
"""

from pathlib import Path

import _bootstrap  # noqa: F401
import _single_threaded  # noqa: F401

from deepseek_sft import cli, files, receipts
from deepseek_sft.data import evaluation_sets
from deepseek_sft.data.evaluation_sets import EvaluationSet
from deepseek_sft.data.fields import MEANINGS, Vocabulary
from deepseek_sft.data.figures import Figures, described
from deepseek_sft.data.formats import AUTO, FORMATS
from deepseek_sft.data.held_out_prompts import HELD_OUT, PROMPTS_FILE
from deepseek_sft.data.hints import source_hint
from deepseek_sft.data.prepare import prepare
from deepseek_sft.data.sources import expand, find_sources
from deepseek_sft.errors import BadInputError
from deepseek_sft.settings import options
from deepseek_sft.settings.data import Data
from deepseek_sft.settings.field_types import keys


def main() -> None:
    names = "; ".join([f"{AUTO}: by the fields", *(f"{name}: {known.summary}" for name, known in FORMATS.items())])
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--source", nargs="+", action="extend", required=True, metavar="[FORMAT=]PATH", help=f"files or globs. {names}"
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="how often records are used, one number per --source"
    )
    parser.add_argument("--output", type=Path, required=True, help="train.jsonl")
    parser.add_argument("--rejects", type=Path, required=True, help="rejects.jsonl")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt, written last")
    parser.add_argument("--duplicates", choices=["reject", "keep"], default="reject", help="what a repetition does")
    parser.add_argument(
        "--fields", nargs="+", default=[], metavar="NAME=MEANING", help=f"what fields mean: {', '.join(MEANINGS)}"
    )
    options.add(parser, Data, "on_invalid", "unused_fields", "on_empty_source")
    options.add(parser, Data, "decontaminate", "held_out")
    parser.add_argument(
        "--evaluation-sets", nargs="+", default=[], metavar="SET", help=keys(Data)["evaluation_sets"].meaning
    )
    parser.add_argument("--workers", type=int, default=1, help="processes; the result is the same for any number")
    arguments = parser.parse_args()

    sets = tuple(map(EvaluationSet.from_word, arguments.evaluation_sets))
    if bool(sets) != bool(arguments.decontaminate):
        raise BadInputError("--decontaminate and --evaluation-sets go together", "give both, or neither")
    vocabulary = Vocabulary(given_meanings(arguments.fields))
    files.require_writable(arguments.output, arguments.rejects, arguments.receipt)
    sources = find_sources(arguments.source, arguments.weights)
    arguments.receipt.unlink(missing_ok=True)  # a receipt never speaks of a run that is being replaced
    for name in (HELD_OUT, PROMPTS_FILE):
        arguments.output.with_name(name).unlink(missing_ok=True)
    figures = prepare(
        sources,
        arguments.output,
        arguments.rejects,
        fail_on_invalid=arguments.on_invalid == "fail",
        keep_duplicates=arguments.duplicates == "keep",
        vocabulary=vocabulary,
        fail_on_unused_fields=arguments.unused_fields == "fail",
        fail_on_empty_source=arguments.on_empty_source == "fail",
        evaluation_sets=sets,
        decontaminate=arguments.decontaminate,
        held_out=arguments.held_out,
        workers=arguments.workers,
    )
    held = {
        "held_out": str(arguments.output.with_name(HELD_OUT)),
        "prompts": str(arguments.output.with_name(PROMPTS_FILE)),
    }
    asked = {"decontaminate": arguments.decontaminate, "evaluation_sets": arguments.evaluation_sets} if sets else {}
    files_of_sets = [path for one in sets for path in expand(one.path)]
    receipts.write(
        arguments.receipt,
        "prepare_data",
        inputs={
            str(path): receipts.input_entry(path) for path in (*(source.path for source in sources), *files_of_sets)
        },
        settings={
            "sources": arguments.source,
            "weights": arguments.weights,
            "on_invalid": arguments.on_invalid,
            "duplicates": arguments.duplicates,
            "fields": dict(vocabulary.given),
            "unused_fields": arguments.unused_fields,
            "on_empty_source": arguments.on_empty_source,
            **asked,
            **({"held_out": arguments.held_out} if arguments.held_out else {}),
        },
        result={"data": str(arguments.output), "rejects": str(arguments.rejects)}
        | (held if arguments.held_out else {}),
        figures=figures.as_dict(),
    )
    tell(figures, arguments.rejects)


def given_meanings(words: list[str]) -> dict[str, str]:
    """``NAME=MEANING`` words as a mapping; raises BadInputError."""
    meanings = {}
    for word in words:
        name, separator, meaning = word.rpartition("=")
        if not separator or not name or meaning not in MEANINGS:
            raise BadInputError(f"--fields {word!r} says no meaning", f"write NAME=MEANING: {', '.join(MEANINGS)}")
        meanings[name] = meaning
    return meanings


def tell(figures: Figures, rejects: Path) -> None:
    """Print what became of sources, fields and records; the report repeats the warnings."""
    for place, source in figures.sources.items():
        chosen = ", ".join(f"{name} {count}" for name, count in sorted(source["formats"].items()))
        counts = f"{source['accepted']:,} of {source['records']:,} records accepted"
        cli.say(f"{place}: read as {chosen or 'no known format'}; {counts}")
    for nothing in figures.empty_sources():
        place = nothing.partition(": ")[0]
        hint = source_hint(Path(place))
        cli.say(f"warning: source that gives nothing: {nothing}{f'; {hint}' if hint else ''}")
    if figures.unused_fields:
        cli.say(f"warning: fields not used: {described(figures.unused_fields, figures.accepted)}")
    if figures.with_tools:
        cli.say(f"{figures.with_tools:,} records define tools, which stand in train.jsonl as `tools`")
    if figures.contamination:
        evaluation_sets.tell(figures.contamination, figures.accepted)
    if held := figures.held_out:
        alike = (
            f"; {held['records_too_much_alike']:,} are too much alike to part" if held["records_too_much_alike"] else ""
        )
        cli.say(f"{held['records']:,} accepted records are held out, {held['prompts']} of them as prompts{alike}")
    cli.say(f"{figures.accepted} of {figures.records} records accepted, {figures.trained_turns} trained turns")
    if figures.rejected:
        reasons = ", ".join(f"{reason} {count}" for reason, count in figures.rejects.most_common())
        loud = "warning: " if 2 * figures.rejected > figures.records else ""
        cli.say(f"{loud}{figures.rejected} rejected ({reasons}), each with its reason in {rejects}")


if __name__ == "__main__":
    cli.run(main)
