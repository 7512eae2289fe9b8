"""The training loop: one iteration is one optimizer step, with its loss normalised over the whole global batch."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from xtuner.engine.runner import TrainLoop as XtunerTrainLoop
from xtuner.parallel.sequence import get_sequence_parallel_rank

from ...errors import GateError
from .. import run_folder
from .data import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """What a step did, summed over all ranks.

    Attributes:
        loss: mean cross-entropy over the step's trained tokens.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding; with loss.
        seconds: wall time of the step.
        stop_requested: someone asked to save and stop.
    """

    loss: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    stop_requested: bool


class TrainLoop(XtunerTrainLoop):
    """xtuner's iteration-based loop with gradient accumulation inside an iteration and resume at any step."""

    stopped = False  # ended early on request

    def run(self) -> None:
        self.runner.call_hook("before_train")
        self.dataloader.sampler.start_step = self._iter
        batches = iter(self.dataloader)
        self.runner.model.train()
        while self._iter < self._max_iters and not self.stopped:
            self.run_iter(next(batches))
        self.runner.call_hook("after_train")

    def run_iter(self, data_batch: list[MicroBatch]) -> None:
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        result = train_step(self.runner.model.model, data_batch, self._iter + 1, self._stop_files())
        last = self._iter + 1 == self._max_iters
        self.stopped = result.stop_requested and not last
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=result)
        self._iter += 1

    def _stop_files(self) -> list[Path]:
        return self.runner.cfg.stop_files if dist.get_rank() == 0 else []


def train_step(engine, batches: list[MicroBatch], step: int, stop_files: list[Path]) -> StepResult:
    """One optimizer step over ``batches``, this rank's micro batches.

    DeepSpeed averages gradients over all ranks. Each rank's summed loss is scaled by ranks / trained tokens of the
    global batch, so that the average is exactly the gradient of the mean over all trained tokens, however they are
    spread over ranks and micro batches.

    Raises:
        GateError: loss or gradient is not finite (on all ranks alike; the loss before the weights change).
    """
    started = time.monotonic()
    device = engine.device
    tokens, trained, stop = _sum_over_ranks(
        sum(b.tokens for b in batches) if get_sequence_parallel_rank() == 0 else 0,
        sum(b.trained_tokens for b in batches) if get_sequence_parallel_rank() == 0 else 0,
        sum(Path(f).exists() for f in stop_files),
        device=device,
    )
    scale = dist.get_world_size() / max(trained, 1)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    for number, batch in enumerate(batches, 1):
        loss = engine(batch.to(device), micro_batches=len(batches))
        summed += loss.detach()
        if number == len(batches):
            mean = _sum_over_ranks(summed.item(), device=device)[0] / max(trained, 1)
            if not _finite(mean):
                raise GateError(f"the loss of step {step} is {mean}", "lower the learning rate, or look at its data")
        engine.backward(loss * scale, scale_wrt_gas=False)
        engine.step()
    norm = float(engine.get_global_grad_norm() or 0.0)
    if not _finite(norm):
        raise GateError(f"the gradient norm of step {step} is {norm}", "lower the learning rate, or look at its data")
    return StepResult(mean, norm, int(tokens), int(trained), time.monotonic() - started, stop > 0)


def stop_files(run: Path, stop_file: str | None) -> list[Path]:
    """Files whose existence asks for a stop: the run's own, made by a signal, and the user's."""
    return [run / run_folder.STOP] + ([Path(stop_file)] if stop_file else [])


def _sum_over_ranks(*values: float, device: torch.device) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return together.tolist()


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
