"""What DeepSpeed's ZeRO-3 does in Python around each module, with less of it: the same gathers in the same order.

For 671B DeepSpeed's hooks run some twelve thousand times a micro batch. Each time they open ranges for a profiler,
format messages that nobody prints, read signatures that never change, wrap tensors that no gradient comes to, and find
out anew what to gather. Here that is left out (docs/training.md has figures). Weights, gradients and their order stay
DeepSpeed's.
"""

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.zero import (
    linear,
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.utils import nvtx, z3_leaf_module

from . import lean_gathers, lean_gradients


def install(optimizer: Any) -> bool:
    """Have the modules under ZeRO-3's optimizer use what is below.

    Args:
        optimizer: ``DeepSpeedZeroOptimizer_Stage3`` before its first forward pass.

    Returns:
        False where DeepSpeed's own way stays: a part on NVMe, modules that are gathered as one, or another DeepSpeed.
    """
    offload = optimizer.parameter_offload
    coordinator, modules = offload.get_param_coordinator(), list(offload.module.modules())
    parameters = list(offload.module.parameters())
    on_disk = any(parameter.nvme_swapper is not None for parameter in parameters)
    if not lean_gathers.is_known(coordinator) or on_disk or any(z3_leaf_module(module) for module in modules):
        return False
    nvtx.enable_nvtx = False
    for module in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
        module.print_rank_0 = _say
    linear.LinearFunctionForZeroStage3 = Linear
    theirs = {handle.id for handle in (*offload.forward_hooks, *offload.backward_hooks)}
    for module in modules:
        _replace_hooks(module, theirs, offload)
    if all(parameter.requires_grad for parameter in parameters):  # whose frozen ones DeepSpeed treats by themselves
        coordinator.__class__ = lean_gathers.PartitionedParameterCoordinator
        coordinator.begin(parameters)
        offload.__class__ = Offload
    lean_gradients.install(optimizer)
    return True


_say_aloud = partition_parameters.print_rank_0


def _say(message: str, debug: bool = False, force: bool = False) -> None:
    """DeepSpeed's, which asks for the rank before it asks whether there is something to say."""
    if debug or force:
        _say_aloud(message, debug, force)


def _replace_hooks(module: torch.nn.Module, theirs: set[int], offload: Any) -> None:
    """One hook before a module and one after it for DeepSpeed's two; none around modules without parameters.

    Args:
        theirs: numbers of DeepSpeed's hooks.
    """
    before = [key for key in module._forward_pre_hooks if key in theirs]
    after = [key for key in module._forward_hooks if key in theirs]
    if module is offload.module or any(True for _ in module.parameters(recurse=False)):
        around = Around(module, offload, module._forward_hooks[after[0]])
        module._forward_pre_hooks[before.pop(0)] = around.before
        module._forward_hooks[after.pop(0)] = around.after
    for key in before:
        del module._forward_pre_hooks[key]
    for key in after:
        del module._forward_hooks[key]


class Around:
    """What comes before and after a module, forward and backward.

    Args:
        theirs: DeepSpeed's hook after a forward pass.
    """

    __slots__ = ("module", "offload", "theirs", "unfinished")

    def __init__(self, module: torch.nn.Module, offload: Any, theirs: Callable[..., Any]):
        self.module, self.offload, self.theirs = module, offload, theirs
        self.unfinished = 0  # inputs whose gradients the backward pass has yet to give

    def before(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.offload.pre_sub_module_forward_function(module)
        self.unfinished = 0
        if not torch.is_grad_enabled():
            return None
        return tuple([_each(argument, self._end_with) for argument in arguments])

    def after(self, module: torch.nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
        if type(result) is torch.Tensor:
            parameter_offload.FWD_MODULE_STACK.pop()
            self.offload.post_sub_module_forward_function(module)
        else:
            self.theirs(module, arguments, result)  # which looks for parameters among several results
        return _each(result, self._begin_with) if torch.is_grad_enabled() else None

    def _end_with(self, tensor: torch.Tensor) -> torch.Tensor:
        return _AfterBackward.apply(tensor, self) if tensor.requires_grad else tensor

    def _begin_with(self, tensor: torch.Tensor) -> torch.Tensor:
        return _BeforeBackward.apply(tensor, self) if tensor.requires_grad else tensor


def _each(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The function of a tensor, or of all in a list, tuple or dictionary; other values as they are."""
    if type(value) is torch.Tensor:
        return function(value)
    if isinstance(value, (torch.Tensor, tuple, list, dict)):
        return parameter_offload.apply_to_tensors_only(function, value)
    return value


class _BeforeBackward(torch.autograd.Function):
    """Of a module's result: its gradient comes before any other of the module's backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, around: Around) -> torch.Tensor:
        ctx.around = around
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        around = ctx.around
        around.offload.pre_sub_module_backward_function(around.module)
        return gradient, None


class _AfterBackward(torch.autograd.Function):
    """Of a module's input: the last gradient of a module's inputs ends its backward pass."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, around: Around) -> torch.Tensor:
        ctx.around = around
        around.unfinished += 1
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        around = ctx.around
        around.unfinished -= 1
        if not around.unfinished:
            around.offload.post_sub_module_backward_function(around.module)
        return gradient, None


class Offload(parameter_offload.DeepSpeedZeRoOffload):
    """What the hooks call; of no parameter a gradient comes from what they do."""

    def pre_sub_module_forward_function(self, module: torch.nn.Module) -> None:
        parameter_offload.FWD_MODULE_STACK.append(module)
        self.param_coordinator.before_module(module, forward=True)

    def post_sub_module_forward_function(self, module: torch.nn.Module) -> None:
        self.param_coordinator.after_module(module, forward=True)

    def pre_sub_module_backward_function(self, module: torch.nn.Module) -> None:
        self.param_coordinator.before_module(module, forward=False)

    def post_sub_module_backward_function(self, module: torch.nn.Module) -> None:
        self.param_coordinator.after_module(module, forward=False)


class Linear(torch.autograd.Function):
    """DeepSpeed's product with a weight that is let go in between: the same products, outside of autocast."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, bias)
        if bias is None:
            return rows.matmul(weight.t())
        if rows.dim() == 2:
            return torch.addmm(bias, rows, weight.t())
        output = rows.matmul(weight.t())
        output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        of_rows = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
        of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            flat = gradient.reshape(-1, gradient.shape[-1])
            of_weight = flat.t().matmul(rows.reshape(-1, rows.shape[-1]))
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = gradient.sum(list(range(gradient.dim() - 1)))
        return of_rows, of_weight, of_bias
