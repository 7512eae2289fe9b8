"""What is computed while a layer's rows travel: the shared experts' outputs, and in the backward pass their gradients.

Autograd runs, of what is ready, what was made last. So the outputs are computed inside the call that exchanges rows,
after it was entered into the graph: their gradients come before those of that call, and ``SendsFirst``, made after
both, begins to send before either. Gradients are added up in the same order as without.
"""

from collections.abc import Callable
from typing import Any

import torch

Underway = list[tuple[torch.Tensor, Any]]  # what arrives, and what waits for it


class Meanwhile:
    """Of one exchange: what is to be computed while it travels, and what its backward pass has begun to send."""

    def __init__(self) -> None:
        self._work: Callable[[], torch.Tensor] | None = None
        self._with_gradients = False
        self._result: torch.Tensor | None = None
        self._begun: Underway | None = None

    def give(self, work: Callable[[], torch.Tensor]) -> None:
        """Something to compute, with gradients where this is called with them."""
        self._work, self._with_gradients = work, torch.is_grad_enabled()

    def compute(self) -> None:
        """Rows are on their way; inside an autograd function, where no gradients are recorded otherwise."""
        if self._work is not None:
            with torch.set_grad_enabled(self._with_gradients):
                self._result = self._work()
            self._work = None

    def sends_first(self, output: torch.Tensor, rows: torch.Tensor, exchange: Any) -> torch.Tensor:
        """The exchange's output, whose backward pass begins to send where something is computed meanwhile."""
        return output if self._result is None else SendsFirst.apply(output, rows, exchange)

    def result(self) -> torch.Tensor:
        """What was computed; once."""
        found, self._result = self._result, None
        if found is None:
            raise RuntimeError("nothing was computed while rows travelled")
        return found

    def begin(self, underway: Underway) -> None:
        """The first chunk of the backward pass is on its way."""
        self._begun = underway

    def taken(self) -> Underway | None:
        """What is on its way; once."""
        begun, self._begun = self._begun, None
        return begun


class SendsFirst(torch.autograd.Function):
    """Passes a shard's output on; its backward pass begins to send the first chunk's rows and gradients."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, rows: torch.Tensor, exchange: Any) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.exchange = exchange
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        ctx.exchange.meanwhile.begin(ctx.exchange.start_back(rows, gradient, 0))
        return gradient, None, None
