"""Sums of gradients over ranks under ZeRO-3, with less Python for each: the same sums in the same order.

DeepSpeed copies each gradient into a buffer, and asks for groups, ranks and sizes that never change. Here a gradient
stays where it is until it is summed, and what never changes is looked up once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import stage3

from . import zero_calls


@dataclass(frozen=True, slots=True)
class Target:
    """Where a parameter's gradient goes.

    Attributes:
        group: of the ranks that it is summed over.
        factor: what the mean over the group is multiplied by.
        part: elements of the gradient that this rank keeps.
    """

    group: Any
    factor: float
    part: int


def install(optimizer: Any) -> bool:
    """Have ZeRO-3's optimizer sum gradients by what is below.

    Returns:
        False where DeepSpeed's own way stays: gradients that are copied together, scaled on their way, swapped to NVMe,
        or several dtypes in which they travel.
    """
    plain = (
        not optimizer.contiguous_gradients
        and optimizer.reduce_scatter
        and optimizer.gradient_predivide_factor == 1.0
        and optimizer.all2all_process_group is None
        and optimizer.autoep_folding_tp_group is None
        and not (optimizer.zenflow or optimizer.swap_optimizer or optimizer.enable_sanity_checks)
        and len(optimizer.ipg_buckets) == 1
        and hasattr(optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition")
    )
    if plain:
        optimizer.__class__ = DeepSpeedZeroOptimizer_Stage3
        optimizer.begin()
    return plain


class DeepSpeedZeroOptimizer_Stage3(stage3.DeepSpeedZeroOptimizer_Stage3):
    """Of DeepSpeed's name for its attributes."""

    def begin(self) -> None:
        """Once, as a constructor: an object of DeepSpeed's becomes one of this class."""
        (self.communicated,) = self.ipg_buckets
        self.are_sums_at_hand = get_accelerator().on_accelerator(self.grad_partitions_flat_buffer)
        self.targets = {}
        for parameter in (parameter for group in self.fp16_groups for parameter in group):
            group = self._get_param_partition_group(parameter)
            ranks, part = group.size(), parameter.partition_numel()
            factor = ranks / float(self._gradient_averaging_world_size([parameter], ranks))
            own = max(0, min(part, parameter.ds_numel - group.rank() * part))
            self.targets[parameter.ds_id] = Target(group, factor, own)

    def reduce_independent_p_g_buckets_and_remove_grads(self, parameter: Any) -> None:
        """Its gradient is there; those before it are summed first where the bucket would be too full."""
        bucket, group = self.ipg_buckets[self.communicated], self.targets[parameter.ds_id].group
        full = bucket.elements + parameter.ds_numel > self.reduce_bucket_size
        if bucket.params and (full or bucket.process_group is not group):
            self.__reduce_and_partition_ipg_grads(self.communicated)
        if not get_accelerator().resolves_data_dependency():
            self.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())
        bucket.params.append(parameter)
        bucket.process_group = group
        bucket.elements += parameter.ds_numel

    def __reduce_and_partition_ipg_grads(self, communication_data_type: torch.dtype) -> None:
        bucket, accelerator = self.ipg_buckets[communication_data_type], get_accelerator()
        if not bucket.params:
            return
        events = self.param_reduce_events
        while events and events[0].query():
            events.popleft()
        if len(events) > self.max_param_reduce_events:
            events.popleft().synchronize()
        with accelerator.stream(self.reduce_and_partition_stream):
            self._sum(sorted(bucket.params, key=lambda parameter: parameter.ds_id), communication_data_type)
            bucket.params.clear()
            bucket.elements, bucket.process_group = 0, None
            if not accelerator.handles_memory_backpressure():
                event = accelerator.Event()
                event.record()
                events.append(event)

    def _sum(self, parameters: list[Any], dtype: torch.dtype) -> None:
        """Sum the gradients of parameters of one group over its ranks, and add this rank's parts to what it holds."""
        for parameter in parameters:
            if parameter.grad.numel() != parameter.ds_numel:
                raise RuntimeError(f"a gradient of {parameter.grad.numel()} elements: {parameter.ds_summary()}")
        target = self.targets[parameters[0].ds_id]
        gradients = [parameter.grad.to(dtype) for parameter in parameters]
        parts = zero_calls.reduce_scatter(gradients, target.group)
        del gradients
        for parameter, part in zip(parameters, parts, strict=True):
            if self.targets[parameter.ds_id].part:
                if target.factor != 1.0:
                    part = part.mul(target.factor)
                self._add(parameter, part.to(self.gradient_accumulation_dtype))
            if not get_accelerator().is_synchronized_device():  # the sum may not have read it yet
                parameter.grad.record_stream(get_accelerator().current_stream())
            parameter.grad = None

    def _add(self, parameter: Any, part: torch.Tensor) -> None:
        self._offload_boundary_param_ids.add(parameter.ds_id)
        total = self.__param_id_to_grad_partition[parameter.ds_id]
        if total.numel() != part.numel():
            total = total.narrow(0, 0, part.numel())
        if self.micro_step_id == 0:
            total.copy_(part, non_blocking=True)
            at_hand = total.to(part.device, non_blocking=True)
        elif self.are_sums_at_hand:
            at_hand = total.add_(part)
        else:  # added on the device, since the host is slow at it
            at_hand = total.to(part.device, non_blocking=True).add_(part)
            total.copy_(at_hand, non_blocking=True)
        if self.offload_optimizer and self.is_gradient_accumulation_boundary():
            self._offload_grad_partition_at_boundary(parameter, at_hand, {}, {})
