"""When ZeRO-3 gathers parameters and lets them go: DeepSpeed decides it once, later micro batches do it again.

DeepSpeed learns the order of modules in two micro batches. From then on what it does before and after each module
follows from that order, its bounds and what is whole at the start; it finds it out anew each time all the same, in some
ten thousand turns of Python. Here its decisions in a micro batch are noted beside what was whole at its start, and
repeated in each later one that starts alike. Where a module comes in another order, or a parameter is not as it was,
DeepSpeed goes on from that place by itself.
"""

import collections
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

_WHOLE, _AWAY = ZeroParamStatus.AVAILABLE, ZeroParamStatus.NOT_AVAILABLE
MOST_STARTS = 8  # of training and of validation, as far as these are known

# Of DeepSpeed 0.19.8's coordinator; another version's may differ, and keeps its own way.
_PRIVATE = (
    "inflight_param_registry",
    "step_id",
    "param_order",
    "param_queue",
    "most_recent_step_id_param_fetched_for",
    "n_available_params",
    "ongoing_fetch_events",
    "max_ongoing_fetch_events",
    "allgather_stream",
    "active_backward_submodules",
    "all_gather_params_",
    "release_param",
)


def is_known(coordinator: Any) -> bool:
    """Whether it is DeepSpeed's as it was read."""
    return all(hasattr(coordinator, f"_PartitionedParameterCoordinator__{name}") for name in _PRIVATE)


@dataclass(slots=True)
class Turn:
    """What was done before or after a module, forward or backward.

    Attributes:
        before: the module, else after it.
        needed: the module's own parameters.
        there: of these what needed not be gathered.
        gathered: parameters that were gathered for it.
        ahead: that were gathered after these, for modules to come.
        let_go: parameters of it that were let go.
        step, taken, elements: DeepSpeed's counts afterwards: turns before modules, entries of the order of parameters
            that it has come past, elements that are whole.
    """

    module: torch.nn.Module
    before: bool
    forward: bool
    needed: tuple[Any, ...]
    there: tuple[Any, ...]
    gathered: tuple[Any, ...] = ()
    ahead: tuple[Any, ...] = ()
    let_go: tuple[Any, ...] = ()
    step: int = 0
    taken: int = 0
    elements: int = 0

    def is_possible(self) -> bool:
        """Whether parameters are whole and away as they were then."""
        for parameter in self.there:
            if parameter.ds_status is _AWAY:
                return False
        return all(parameter.ds_status is _AWAY for parameter in (*self.gathered, *self.ahead))


class PartitionedParameterCoordinator(partitioned_param_coordinator.PartitionedParameterCoordinator):
    """Of DeepSpeed's name for its attributes. No parameter is frozen and none on NVMe."""

    def begin(self, parameters: Sequence[Any]) -> None:
        """Once, as a constructor: an object of DeepSpeed's becomes one of this class.

        Args:
            parameters: all of the model.
        """
        self.parameters = tuple(parameters)
        self.starts: dict[bytes, list[Turn]] = {}  # turns by what is whole at the start
        self.turns: list[Turn] | None = None  # of this micro batch; None while its order is not known
        self.place = 0  # in them
        self.repeating = False
        self.under_way: dict[int, tuple[Any, Any]] = {}  # parameter and what is to be waited for, by number
        self._seen: list[Any] = []

    def reset_step(self) -> None:
        """A forward pass begins."""
        super().reset_step()
        self.place, self.turns = 0, None
        if self.is_complete_trace():
            whole = bytes(parameter.ds_status is _WHOLE for parameter in self.parameters)
            if whole not in self.starts and len(self.starts) == MOST_STARTS:
                self.starts.clear()
            self.turns = self.starts.setdefault(whole, [])
        self.repeating = bool(self.turns)

    def _clear_trace_structures(self) -> None:
        super()._clear_trace_structures()
        self.starts, self.turns, self.repeating = {}, None, False

    def _clean_inflight_param_registry(self) -> None:
        self._hand_over()
        super()._clean_inflight_param_registry()

    def before_module(self, module: torch.nn.Module, forward: bool) -> None:
        """Have its parameters whole, and begin to gather what comes next."""
        if self.repeating and (turn := self._next(module, True, forward)):
            self._fetch_again(turn)
            return
        self.trace_prologue(module)
        if self.is_record_trace():
            self.record_module(module)
        if self.turns is None:
            self.fetch_sub_module(module, forward)
            return
        needed = _parameters(module)
        there = tuple(parameter for parameter in needed if parameter.ds_status is not _AWAY)
        self._seen = []
        self.fetch_sub_module(module, forward)
        gathered = self._seen.pop(0) if len(there) < len(needed) else ()
        ahead = self._seen.pop(0) if self._seen else ()
        self._note(Turn(module, True, forward, needed, there, gathered, ahead))

    def after_module(self, module: torch.nn.Module, forward: bool) -> None:
        """Let its parameters go, but for those that are needed again soon."""
        if self.repeating and (turn := self._next(module, False, forward)):
            self._release_again(turn)
            return
        self._seen = []
        self.release_sub_module(module, forward=forward)
        if self.turns is not None:
            needed = _parameters(module)
            self._note(Turn(module, False, forward, needed, needed, let_go=tuple(self._seen)))

    def _note(self, turn: Turn) -> None:
        turn.step, turn.elements = self.__step_id, self.__n_available_params
        turn.taken = len(self.__param_order) - len(self.__param_queue)
        self.turns.append(turn)
        self.place += 1

    def _next(self, module: torch.nn.Module, before: bool, forward: bool) -> Turn | None:
        """The next turn if it is this one; else DeepSpeed goes on by itself."""
        if self.place < len(self.turns):
            turn = self.turns[self.place]
            if turn.module is module and turn.before is before and turn.forward is forward and turn.is_possible():
                self.place += 1
                return turn
        self._go_on_without()
        return None

    def _go_on_without(self) -> None:
        """Leave DeepSpeed's own records as they would be at this place; what comes now is noted in the rest's stead."""
        if self.place:
            last, order, used = self.turns[self.place - 1], self.__param_order, {}
            for entry in order[: last.taken]:
                used[entry.param] = entry.step_id_last_used_at
            self.__most_recent_step_id_param_fetched_for.update(used)
            self.__param_queue = collections.deque(order[last.taken :])
            self.__step_id, self.__n_available_params = last.step, last.elements
        self._hand_over()
        del self.turns[self.place :]
        self.repeating = False

    def _hand_over(self) -> None:
        """What is under way, to DeepSpeed's own records."""
        self.__inflight_param_registry.data.update(self.under_way.values())
        self.under_way.clear()

    def _fetch_again(self, turn: Turn) -> None:
        number, under_way = turn.module.ds_id, self.under_way
        if not turn.forward:
            self.__active_backward_submodules[number] = turn.module
        if turn.gathered:
            self._gather(turn.gathered)
        for parameter in turn.needed:
            parameter.ds_active_sub_modules.add(number)
            if found := under_way.pop(parameter.ds_id, None):
                self._wait(found[1])
        if not get_accelerator().resolves_data_dependency():
            get_accelerator().current_stream().wait_stream(self.__allgather_stream)
        if turn.ahead:
            self._gather(turn.ahead)

    def _gather(self, parameters: tuple[Any, ...]) -> None:
        """Begin to gather them at once."""
        with get_accelerator().stream(self.__allgather_stream):
            handle = parameters[0].all_gather_coalesced(parameters)
        for parameter in parameters:
            self.under_way[parameter.ds_id] = (parameter, handle)

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

    def _release_again(self, turn: Turn) -> None:
        number = turn.module.ds_id
        if not turn.forward:
            self.__active_backward_submodules.pop(number, None)
        for parameter in turn.needed:
            parameter.ds_active_sub_modules.discard(number)
        for parameter in turn.let_go:
            if parameter.ds_status is _WHOLE and not parameter.ds_active_sub_modules:
                _free(parameter)

    # What DeepSpeed's own code calls, noted.

    def __all_gather_params_(self, params: Any, forward: bool, quantize: bool = False) -> None:
        self._seen.append(tuple(parameter for parameter in params if parameter.ds_status is _AWAY))
        super().__all_gather_params_(params, forward, quantize)

    def __release_param(self, param: Any, free_data: bool = True) -> None:
        there = param.ds_status is _WHOLE
        super().__release_param(param, free_data)
        if there and param.ds_status is _AWAY:
            self._seen.append(param)


def _parameters(module: torch.nn.Module) -> tuple[Any, ...]:
    """Its own and external ones, each once."""
    return tuple(dict.fromkeys(partitioned_param_coordinator.iter_params(module)))


def _free(parameter: Any) -> None:
    """Let its memory go; DeepSpeed's where a device may still compute with it."""
    if not get_accelerator().is_synchronized_device():
        partition_parameters.free_param(parameter)
        return
    parameter.data = _nothing(parameter.dtype, parameter.device)
    parameter.ds_status = _AWAY


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device=device)
