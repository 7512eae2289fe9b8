"""Gates: a step after which the run must not go on as if nothing were wrong."""

from pathlib import Path

import torch.distributed as dist

from ...errors import GateError
from .. import first_batch, run_folder
from . import start_checks
from .step_result import StepResult

CAUSES = {
    "first_loss": f"""the usual causes, most frequent first:
  - the chat template or the base is not what the data was made for: read {first_batch.NAME} in the run folder
  - loss on the prompt or on nothing: the same file shows what is trained
  - another config.json than the release's: rope_scaling, routed_scaling_factor, norm_topk_prob, top-k
    ({start_checks.NAME} holds what was compared before this step)
  - a base whose weights were damaged on the way: verify its checksums, run prepare_model again
If the loss is right for this data, raise train.first_loss_max; the next start then goes on.""",
    "not_finite": (
        "the weights are as before this step, and the last checkpoint is kept. Lower train.learning_rate, look at the "
        "step's rows, or set train.on_not_finite: skip to go on without such steps"
    ),
    "spike": (
        "the weights are as before this step, and the last checkpoint is kept. Look at the step's rows, raise "
        "train.spike_factor, or set train.on_spike: skip"
    ),
}


def check_health(run: Path, result: StepResult) -> None:
    """
    Raises:
        GateError: on all ranks alike, the step is not finite, or a spike, and the settings say to stop then.
    """
    verdict = result.verdict
    if verdict.stop:
        _close(run, verdict.kind, verdict.message, result.loss if verdict.kind == "spike" else None)


def check_first_loss(run: Path, result: StepResult, most: float | None) -> None:
    """A base that is loaded or computed wrongly shows in the first loss, before any GPU hours are spent.

    Args:
        result: of the first step.
        most: ``train.first_loss_max``.

    Raises:
        GateError: on all ranks alike.
    """
    if result.trained_tokens == 0:
        raise GateError("the first step trains on no token", f"read {first_batch.NAME} in {run}")
    if most is not None and not result.loss <= most:
        message = f"the first loss is {result.loss:.4f}, above train.first_loss_max {most}"
        _close(run, "first_loss", message, result.loss)


def _close(run: Path, kind: str, message: str, value: float | None) -> None:
    if dist.get_rank() == 0:
        run_folder.write_gate(run, kind, message, value)
    raise GateError(message, CAUSES[kind])
