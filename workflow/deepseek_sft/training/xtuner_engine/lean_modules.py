"""What DeepSpeed's ZeRO-3 does in Python around each module call, with less of it: the same gathers in the same order.

For 671B DeepSpeed's hooks run some twelve thousand times a micro batch. Each time they open ranges for a profiler,
format messages that nobody prints, read signatures that never change and look parameters up by name. Here that is left
out, and parameters are looked up once (docs/training.md has figures). Weights, gradients and their order stay
DeepSpeed's.
"""

import inspect
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import (
    linear,
    parameter_offload,
    partition_parameters,
    partitioned_param_coordinator,
    stage3,
)
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import nvtx, z3_leaf_module

# Of DeepSpeed 0.19.8's coordinator; another version's may differ, and keeps its own way.
_PRIVATE = (
    "inflight_param_registry",
    "step_id",
    "param_queue",
    "most_recent_step_id_param_fetched_for",
    "n_available_params",
    "max_n_available_params",
    "prefetch_bucket_sz",
    "ongoing_fetch_events",
    "max_ongoing_fetch_events",
    "allgather_stream",
    "active_backward_submodules",
    "params_to_release",
)


def install(optimizer: Any) -> bool:
    """Have the modules under ZeRO-3's optimizer use what is below.

    Args:
        optimizer: ``DeepSpeedZeroOptimizer_Stage3`` before its first forward pass.

    Returns:
        False where DeepSpeed's own way stays: a part on NVMe, modules that are gathered as one, or another DeepSpeed.
    """
    offload = optimizer.parameter_offload
    coordinator, modules = offload.get_param_coordinator(), list(offload.module.modules())
    known = all(hasattr(coordinator, f"_PartitionedParameterCoordinator__{name}") for name in _PRIVATE)
    on_disk = any(parameter.nvme_swapper is not None for parameter in offload.module.parameters())
    if not known or on_disk or any(z3_leaf_module(module) for module in modules):
        return False
    nvtx.enable_nvtx = False
    for module in (parameter_offload, partition_parameters, partitioned_param_coordinator, stage3):
        module.print_rank_0 = _say
    _fix_signature(linear.LinearFunctionForZeroStage3)
    for module in modules:
        _lighten_hooks(module, needed=module is offload.module or any(True for _ in module.parameters(recurse=False)))
    coordinator.__class__ = PartitionedParameterCoordinator
    coordinator.looked_up = {}
    offload.__class__ = Offload
    return True


_say_aloud = partition_parameters.print_rank_0


def _say(message: str, debug: bool = False, force: bool = False) -> None:
    """DeepSpeed's, which asks for the rank before it asks whether there is something to say."""
    if debug or force:
        _say_aloud(message, debug, force)


def _fix_signature(function: type[torch.autograd.Function]) -> None:
    """Have torch read once what the function takes, and not at each of its calls."""
    function.forward.__signature__ = inspect.signature(function.forward)


def _lighten_hooks(module: torch.nn.Module, needed: bool) -> None:
    """Take DeepSpeed's hooks from a module without parameters; else call them without torch.compile's guard."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if not getattr(hook, "__module__", "").startswith("deepspeed."):
                continue
            if needed:
                hooks[key] = getattr(hook, "_torchdynamo_orig_callable", hook)
            else:
                del hooks[key]
    for function in (module.__dict__.get("pre_bwd_fn"), module.__dict__.get("post_bwd_fn")):
        if function is not None:
            _fix_signature(function)


class Offload(parameter_offload.DeepSpeedZeRoOffload):
    """What the hooks call."""

    @torch.no_grad()
    def pre_sub_module_forward_function(self, module: torch.nn.Module) -> None:
        parameter_offload.FWD_MODULE_STACK.append(module)
        self._fetch(module, forward=True)

    @torch.no_grad()
    def post_sub_module_forward_function(self, module: torch.nn.Module) -> None:
        self.param_coordinator.release_sub_module(module, forward=True)

    @torch.no_grad()
    def pre_sub_module_backward_function(self, module: torch.nn.Module) -> None:
        self._fetch(module, forward=False)

    @torch.no_grad()
    def post_sub_module_backward_function(self, module: torch.nn.Module) -> None:
        self.param_coordinator.release_sub_module(module, forward=False)

    def _fetch(self, module: torch.nn.Module, forward: bool) -> None:
        coordinator = self.param_coordinator
        coordinator.trace_prologue(module)
        if coordinator.is_record_trace():
            coordinator.record_module(module)
        coordinator.fetch_sub_module(module, forward=forward)


class PartitionedParameterCoordinator(partitioned_param_coordinator.PartitionedParameterCoordinator):
    """Which parameters are gathered and let go before and after each module; of DeepSpeed's name for its attributes.

    While the order of modules is being learnt, and for modules with frozen parameters, DeepSpeed's own code runs.

    Attributes:
        looked_up: parameters of each module by its number; None where one is frozen.
    """

    looked_up: dict[int, tuple[Any, ...] | None]

    def _clear_trace_structures(self) -> None:
        super()._clear_trace_structures()
        self.looked_up = {}

    def _parameters(self, module: torch.nn.Module) -> tuple[Any, ...] | None:
        if module.ds_id not in self.looked_up:
            found = tuple(dict.fromkeys(partitioned_param_coordinator.iter_params(module)))
            trained = all(parameter.requires_grad for parameter in found)
            self.looked_up[module.ds_id] = found if trained else None
        return self.looked_up[module.ds_id]

    def fetch_sub_module(self, module: torch.nn.Module, forward: bool) -> None:
        parameters = self._parameters(module) if self.is_complete_trace() else None
        if parameters is None:
            super().fetch_sub_module(module, forward)
            return
        if not forward:
            self.__active_backward_submodules[module.ds_id] = module
        self._gather([p for p in parameters if p.ds_status is ZeroParamStatus.NOT_AVAILABLE])
        under_way = self.__inflight_param_registry.data
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(module.ds_id)
            handle = under_way.pop(parameter, None)
            if handle is not None:
                self._wait(handle)
            if parameter.ds_status is not ZeroParamStatus.AVAILABLE:
                raise RuntimeError(parameter.ds_summary())
        if not get_accelerator().resolves_data_dependency():
            get_accelerator().current_stream().wait_stream(self.__allgather_stream)
        self._leave_queue(module, parameters)
        self._prefetch()
        self.__step_id += 1

    def _gather(self, parameters: list[Any]) -> None:
        """Begin to gather them at once."""
        if not parameters:
            return
        with get_accelerator().stream(self.__allgather_stream):
            handle = parameters[0].all_gather_coalesced(parameters)
        under_way = self.__inflight_param_registry.data
        for parameter in parameters:
            self.__n_available_params += parameter.ds_numel
            under_way[parameter] = handle

    def _wait(self, handle: Any) -> None:
        """Have gathered parameters arrive, and hold the host back where it is several gathers ahead of the device."""
        accelerator, events = get_accelerator(), self.__ongoing_fetch_events
        with accelerator.stream(self.__allgather_stream):
            while events and events[0].query():
                events.popleft()
            if len(events) > self.__max_ongoing_fetch_events:
                events.popleft().synchronize()
            handle.wait()
            if not accelerator.handles_memory_backpressure():
                event = accelerator.Event()
                event.record()
                events.append(event)

    def _leave_queue(self, module: torch.nn.Module, parameters: tuple[Any, ...]) -> None:
        """Take what is needed now from those to be gathered ahead."""
        fetched, queue = self.__most_recent_step_id_param_fetched_for, self.__param_queue
        expected = {p for p in parameters if fetched[p] < self.__step_id}
        left = set()
        while queue and len(left) < len(expected):
            entry = queue.popleft()
            fetched[entry.param] = entry.step_id_last_used_at
            left.add(entry.param)
        if left != expected:
            raise RuntimeError(
                f"module {module.ds_id} ({type(module).__name__}) at {self.__step_id} of the learnt order needs "
                f"parameters {sorted(p.ds_id for p in expected)}, and next in the order are "
                f"{sorted(p.ds_id for p in left)}"
            )

    def _prefetch(self) -> None:
        """Begin to gather what comes next, within DeepSpeed's bounds."""
        fetched, queue = self.__most_recent_step_id_param_fetched_for, self.__param_queue
        room = min(self.__max_n_available_params - self.__n_available_params, self.__prefetch_bucket_sz)
        chosen: dict[Any, None] = {}
        elements = 0
        while queue and elements < room:
            entry = queue.popleft()
            parameter = entry.param
            fetched[parameter] = max(fetched[parameter], entry.step_id_last_used_at)
            if parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE and parameter not in chosen:
                chosen[parameter] = None
                elements += parameter.ds_numel
        self._gather(list(chosen))

    def release_sub_module(self, module: torch.nn.Module, forward: bool = False) -> None:
        parameters = self._parameters(module) if self.is_complete_trace() else None
        if parameters is None or module.ds_recompute_parameters:
            super().release_sub_module(module, forward)
            return
        if not forward:
            self.__active_backward_submodules.pop(module.ds_id, None)
        let_go = self.__params_to_release(module, self.__step_id)
        for parameter in parameters:
            active = parameter.ds_active_sub_modules
            active.discard(module.ds_id)
            if parameter.ds_id not in let_go or parameter.is_external_param:
                continue
            if parameter.ds_status is ZeroParamStatus.AVAILABLE and not active:
                partition_parameters.free_param(parameter)
                self.__n_available_params -= parameter.ds_numel
