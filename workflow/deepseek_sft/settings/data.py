"""Where the chats come from, and how they become tokens."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen
from pydantic import Discriminator, Tag

from ..data.chat_templates import BASE, TEMPLATES
from ..data.fields import MEANINGS
from ..data.formats import AUTO, FORMATS
from .field_types import AboveZero, Named, Part, Text, Truth, Whole, section, setting


@section
class SourceFiles:
    path: Named
    """File or glob."""
    format: Literal[AUTO, *FORMATS] = AUTO
    """Format of its records, see docs/data.md."""
    weight: AboveZero = 1
    """How often each record is used: 2 twice, 0.5 every second one by chance."""


@section
class EvaluationSetFiles:
    path: Named
    """File or glob."""
    fields: Annotated[tuple[Named, ...], MinLen(1)] | None = None
    """Fields that hold texts of an item, such as `question` or `doc.question`; null takes the usual names."""


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "keys"


EvaluationSet = Annotated[
    Annotated[Named, Tag("text")] | Annotated[EvaluationSetFiles, Tag("keys")], Discriminator(_kind)
]
Source = Annotated[Annotated[Named, Tag("text")] | Annotated[SourceFiles, Tag("keys")], Discriminator(_kind)]


@section
class Data:
    sources: Annotated[tuple[Source, ...], MinLen(1)]
    """Files of chats: `[FORMAT=]PATH`, or `{path, format, weight}`, globs allowed: JSON arrays, JSONL (plain, .gz,
    .zst), Parquet. `weight` says how often each record is used (2: twice; 0.5: every second one, by chance)."""
    on_invalid: Literal["reject", "fail"] = "reject"
    """What a broken record does: goes to `rejects.jsonl` with its reason, or stops the stage."""
    fields: dict[str, Literal[*MEANINGS]] = setting({}, later=True)
    """What fields of the records mean that are not known: `{mask: "not loss", notes: ignore}`. By name, or by path
    where they are printed so (`messages[].mask`). See docs/data.md."""
    unused_fields: Literal["warn", "fail"] = setting("warn", later=True)
    """What fields do that nothing uses: a warning that counts them, or the stage fails. It always fails where the name
    of one says training, reasoning or system, and its value could be that."""
    on_empty_source: Literal["warn", "fail"] = setting("warn", later=True)
    """What a source does of which no record is accepted, an empty file included."""
    decontaminate: Literal["report", "reject"] | None = setting(None, later=True)
    """What a record does that holds an item of `evaluation_sets`, whole or slightly changed: is counted, with
    examples, or goes to `rejects.jsonl`."""
    evaluation_sets: tuple[EvaluationSet, ...] = setting((), later=True)
    """Files of evaluation items that must not be trained on: `PATH`, or `{path, fields}`, globs allowed: JSONL, JSON
    arrays, Parquet, or text of an item a line."""
    held_out: Part = setting(0, later=True)
    """Share of the records that is not trained on, such as `0.005` or `0.5 %`: chosen by a hash of the conversation,
    near duplicates on one side. Up to 100 of them are the smoke test's prompts where `smoke_test.prompts` is null."""
    template: Literal[*TEMPLATES, BASE, AUTO] = "deepseek-r1"
    """Chat template the samples are rendered with; must be the one the model will be served with. `auto` takes the one
    that fits the base's own and says so; `base` renders with the base's own, whatever it is."""
    on_template_difference: Literal["fail", "warn"] = setting("fail", later=True)
    """What `template` does where it gives other prompts than the base's own chat template: stops at the start, or warns
    (the model will be served with another chat template)."""
    tokenizer: Text | None = None
    """Folder with `tokenizer.json`; null takes the base model's."""
    max_length: Annotated[Whole, Ge(16)] = 32768
    """Longest sample in tokens."""
    on_too_long: Literal["reject", "truncate"] = "reject"
    """What a longer sample does."""
    history_reasoning: Literal["split", "strip", "keep"] = "split"
    """Reasoning of earlier turns: one sample per trained turn with history as inference shows it (`split`), removed
    (`strip`), or kept (`keep`)."""
    pack: Truth | Literal["auto"] = False
    """Whole samples share rows of `max_length` tokens (best-fit packing). No attention across samples, positions start
    anew; saves the padding between short and long samples. `auto` packs, but leaves an experiment as it is whose tokens
    were made unpacked."""

    def problems(self) -> Iterator[str]:
        if self.decontaminate and not self.evaluation_sets:
            yield "decontaminate: needs the files of the items in evaluation_sets"
        if self.evaluation_sets and not self.decontaminate:
            yield "evaluation_sets: are looked at with decontaminate: report or reject"
