"""Keys of `train.deepspeed`: which may go into DeepSpeed's configuration, and how they are merged into it.

Only keys are taken that change speed or memory. The others belong to a key of our own, or would change what the loss,
the checkpoints or their conversion depend on. DeepSpeed itself ignores unknown keys at the top without a word.
"""

from collections.abc import Iterator
from typing import Any

ZERO = "zero_optimization"
TOP: dict[str, type] = {
    "comms_logger": dict,
    "dump_state": bool,
    "memory_breakdown": bool,
    "steps_per_print": int,
    "wall_clock_breakdown": bool,
}
IN_ZERO: dict[str, type] = {
    "overlap_comm": bool,
    "contiguous_gradients": bool,
    "reduce_bucket_size": int,
    "sub_group_size": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "use_multi_rank_bucket_allreduce": bool,
}
REFUSED: dict[str, str] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "set train.micro_batch_size"),
    "gradient_accumulation_steps": "set train.gradient_accumulation_steps",
    "gradient_clipping": "set train.max_grad_norm",
    "communication_data_type": "set train.gradient_communication_dtype",
    "data_types": "set train.gradient_accumulation_dtype",
    "bf16": "set train.dtype",
    **dict.fromkeys(("fp16", "amp", "torch_autocast"), "checkpoints and losses are those of bfloat16 or float32"),
    "optimizer": "set train.optimizer, learning_rate, adam_betas and weight_decay",
    "scheduler": "the learning rate is a function of the step, so that resume is exact: set train.lr_schedule",
    "checkpoint": "conversion reads checkpoints as they are written now",
    "prescale_gradients": "the loss is scaled by the step's trained tokens, which this would scale again",
    "gradient_predivide_factor": "the loss is scaled by the step's trained tokens, which this would scale again",
    f"{ZERO}.stage": "conversion and resume read the checkpoints of stage 3",
    **dict.fromkeys((f"{ZERO}.offload_optimizer", f"{ZERO}.offload_param"), "set train.strategy and train.offload"),
    **dict.fromkeys(
        (f"{ZERO}.{key}" for key in ("zero_hpz_partition_size", "mics_shard_size")),
        "conversion joins parameters that are split over all ranks",
    ),
    **dict.fromkeys(
        (f"{ZERO}.{key}" for key in ("zero_quantized_weights", "zero_quantized_gradients")),
        "weights and gradients would be rounded further on their way",
    ),
    f"{ZERO}.stage3_param_persistence_threshold": "conversion and the plan count on every parameter's being split",
}


def problems(given: dict[str, Any] | None) -> Iterator[str]:
    """What is wrong with `train.deepspeed`: the key, and why it is not taken."""
    for key, value in (given or {}).items():
        if key != ZERO:
            yield from _problem(key, value, TOP)
        elif not isinstance(value, dict):
            yield f"deepspeed.{ZERO}: is {value!r}, expected keys and their values"
        else:
            for name, inner in value.items():
                yield from _problem(
                    f"{ZERO}.{name}", inner, {f"{ZERO}.{known}": kind for known, kind in IN_ZERO.items()}
                )


def _problem(key: str, value: Any, known: dict[str, type]) -> Iterator[str]:
    if key in REFUSED:
        yield f"deepspeed.{key}: is not taken: {REFUSED[key]}"
    elif key not in known:
        yield f"deepspeed.{key}: is not one of the keys that are safe to set: {', '.join(known)}"
    elif type(value) is not known[key] or (known[key] is int and value < 1):
        wanted = {int: "a whole number above 0 (write 500000000, not 5e8)", bool: "true or false", dict: "keys"}
        yield f"deepspeed.{key}: is {value!r}, expected {wanted[known[key]]}"


def merged(config: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """DeepSpeed's configuration with `train.deepspeed` over it, section by section."""
    result = dict(config)
    for key, value in (given or {}).items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result
