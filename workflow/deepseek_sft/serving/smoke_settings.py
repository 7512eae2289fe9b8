"""Settings of the smoke test, and their form on its command line: declared once, here."""

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from ..errors import BadInputError


def _setting(default: Any, meaning: str) -> Any:
    """A setting with its default and its help text; lists become tuples, which are immutable."""
    return dataclasses.field(default=tuple(default) if isinstance(default, list) else default, metadata={"m": meaning})


@dataclasses.dataclass(frozen=True)
class SmokeSettings:
    """Settings of the smoke test; each field's meaning is its help text. ``None`` switches a gate off."""

    prompts: str | None = _setting(None, "JSONL of held-out samples, see docs/serving.md")
    template: str | None = _setting(None, "template of training (data.template); none: prompts are not compared")
    max_tokens: int = _setting(4096, "longest answer in tokens")
    min_format_rate: float | None = _setting(0.9, "share of held-out answers that must be well formed")
    min_exact_match_rate: float | None = _setting(None, "share of held-out answers that must be the expected ones")
    max_loss: float | None = _setting(None, "largest mean loss of the served model on the held-out references, nats")
    min_loss_drop: float | None = _setting(0.0, "nats by which this loss must lie below the base model's, at more than")
    base_measured: str | None = _setting(None, "held-out measurement of the base model, by measure_held_out.py")
    trained_difference_factor: float = _setting(1.0, "multiplies the bounds on differences from training's losses")
    concurrency: int = _setting(32, "requests at the same time")
    request_timeout_s: float = _setting(600, "deadline of one request in seconds")
    logprobs_max_parameters: float = _setting(2e8, "models up to this size are compared with transformers")
    benchmark: bool = _setting(True, "measure time to first token and tokens per second")
    benchmark_concurrency: tuple[int, ...] = _setting([1, 8, 32], "concurrencies to measure at")
    benchmark_input_tokens: int = _setting(512, "tokens of a measured prompt")
    benchmark_output_tokens: int = _setting(128, "tokens of a measured answer")


def check(smoke: SmokeSettings, where: str) -> None:
    """Refuse values that cannot work.

    Args:
        where: start of the message, naming the file.

    Raises:
        BadInputError: names the setting, its value and what is expected.
    """
    positive = ("max_tokens", "concurrency", "request_timeout_s", "benchmark_input_tokens", "benchmark_output_tokens")
    for name in (*positive, "trained_difference_factor"):
        if getattr(smoke, name) <= 0:
            raise BadInputError(f"{where}: smoke_test.{name} is {getattr(smoke, name)}, expected more than 0")
    for name in ("min_format_rate", "min_exact_match_rate"):
        rate = getattr(smoke, name)
        if rate is not None and not 0 <= rate <= 1:
            raise BadInputError(f"{where}: smoke_test.{name} is {rate}, expected 0 to 1")
    levels = smoke.benchmark_concurrency
    if not levels or any(not isinstance(level, int) or level < 1 for level in levels):
        raise BadInputError(
            f"{where}: smoke_test.benchmark_concurrency is {list(levels)}, expected numbers of at least 1"
        )


def record_beside(transcript: Path) -> Path:
    """Where the record of the held-out samples lies, unless said otherwise."""
    return transcript.with_name("evaluation.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting."""
    hints = typing.get_type_hints(SmokeSettings)
    for field in dataclasses.fields(SmokeSettings):
        name, default, meaning = f"--{field.name.replace('_', '-')}", field.default, field.metadata["m"]
        if hints[field.name] is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=meaning)
        elif isinstance(default, tuple):
            shown = ",".join(map(str, default))
            parser.add_argument(name, type=_numbers, default=shown, help=f"{meaning}, separated by commas")
        else:
            kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
            kind = _or_none(kinds[0]) if type(None) in kinds else kinds[0]
            parser.add_argument(name, type=kind, default=default, help=meaning)


def from_arguments(arguments: argparse.Namespace) -> SmokeSettings:
    """The settings that a command line gives."""
    names = [field.name for field in dataclasses.fields(SmokeSettings)]
    settings = SmokeSettings(**{name: getattr(arguments, name) for name in names})
    check(settings, "command line")
    return settings


def as_arguments(settings: SmokeSettings) -> list[str]:
    """The command line that gives these settings."""
    words = []
    for field in dataclasses.fields(settings):
        name, value = field.name.replace("_", "-"), getattr(settings, field.name)
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (tuple, list)):
            words.append(f"--{name}={','.join(map(str, value))}")
        else:
            words.append(f"--{name}={'none' if value is None else value}")
    return words


def _or_none(kind: type) -> Any:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse names it in its error messages
    return parse


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))
