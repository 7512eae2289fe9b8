"""How the served model is tested."""

from typing import Annotated

from annotated_types import MinLen

from .field_types import AboveZero, NotNegative, Number, Positive, Share, Text, Truth, section, setting


@section
class SmokeTest:
    prompts: Text | None = None
    """JSONL of held-out samples in the form of training data, or of bare prompts `{id, messages, answer}`, see
    docs/serving.md; null takes what `data.held_out` keeps out of training, if anything."""
    max_tokens: Positive = 4096
    """Longest answer in tokens."""
    min_format_rate: Share | None = 0.9
    """Share of the answers whose reasoning must close and be followed by an answer and the end; null only reports
    it."""
    min_exact_match_rate: Share | None = None
    """Share of the answers that must be the expected ones; null only reports it."""
    max_loss: Number | None = None
    """Largest mean loss of the served model on the held-out references, in nats per trained token; null only reports
    it."""
    min_loss_drop: Number | None = 0.0
    """The base model's loss on the references must lie above the served model's by more than this, in nats, where the
    base is measured; null only reports it."""
    base_measured: Text | None = None
    """File with the base model's losses and answers on these samples, written by
    `workflow/scripts/measure_held_out.py`. Models up to `logprobs_max_parameters` need none: transformers computes
    them."""
    trained_difference_factor: AboveZero = setting(1.0, later=True)
    """By which the bounds on the difference of the served model's losses from those that training left are multiplied
    (docs/serving.md). They were measured on small models: where a large correct one differs by more, raise it to what
    its receipt shows."""
    concurrency: Positive = 32
    """Requests at the same time."""
    request_timeout_s: AboveZero = 600
    """Deadline of one request in seconds, to its last byte."""
    logprobs_max_parameters: NotNegative = 200000000.0
    """Models up to this size are compared with transformers, log-probability by log-probability."""
    benchmark: Truth = True
    """Measure time to first token and tokens per second."""
    benchmark_concurrency: Annotated[tuple[Positive, ...], MinLen(1)] = (1, 8, 32)
    """Numbers of requests at the same time to measure at."""
    benchmark_input_tokens: Positive = 512
    """Tokens of a measured prompt."""
    benchmark_output_tokens: Positive = 128
    """Tokens of a measured answer."""
