"""Forward passes that leave training as it was.

In evaluation mode nothing is counted: neither experts' tokens nor compute time nor what moves balance biases; no
balance loss is added, and no layer is recomputed or keeps anything for it. Random numbers are put back. ZeRO-3 follows
the order of modules that training recorded, of which a forward pass is the beginning: at its end it has gathered ahead
for a backward pass that does not come, which is given up here. Where training has recorded none yet, it would take the
forward pass for it: then that is forgotten. DeepSpeed is pinned.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus


@contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """No gradient, nothing counted, and nothing different afterwards; a collective, between steps.

    Args:
        engine: DeepSpeed's.
    """
    module = engine.module
    training = module.training
    unrecorded = _coordinator(engine).is_invalid_trace()
    devices = [engine.device] if engine.device.type == "cuda" else []
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        module.train(training)
    _release(engine)
    if unrecorded and not _coordinator(engine).is_invalid_trace():
        _coordinator(engine)._invalidate_trace()


def _coordinator(engine: Any) -> Any:
    """Of ZeRO-3's gathers."""
    return engine.optimizer.parameter_offload.get_param_coordinator()


def _release(engine: Any) -> None:
    """Give up what is gathered, but for what ZeRO-3 keeps whole all the time."""
    _coordinator(engine).reset_step()  # waits for what is under way
    for parameter in engine.module.parameters():
        if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
            parameter.ds_active_sub_modules.clear()
            parameter.partition()
