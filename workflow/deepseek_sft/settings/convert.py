"""What the trained checkpoint becomes."""

from typing import Literal

from .field_types import Count, SizeOrAuto, SizeOrBase, Truth, matching, section, setting

Checkpoint = matching(r"^(newest|step_[0-9]+)$", "`newest`, or a step like step_200")


@section
class Convert:
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Format of the served weights. `fp8` is the official release's (blocks of 128 × 128 with a factor each): half of
    bf16, 671B is served by 2 nodes of 8 × 80 GB instead of 4; needs GPUs."""
    mtp: Literal["drop", "copy"] = "drop"
    """The multi-token-prediction layer, which is not trained: leave it out of the served model, or copy the base's."""
    max_shard_size: SizeOrBase = "5GB"
    """Size of one safetensors file at most; `base`: the files are named and filled as the base model's."""
    memory: SizeOrAuto = setting("auto", operational=True)
    """Most memory the conversion's buffers may take on a node; `auto` is a share of what is available."""
    swap: Truth = setting(False, operational=True)
    """With true a `memory` above what is free gets a swap file on the node's disk for the time of the run, where root
    and disk allow it."""
    workers: Count = setting(0, operational=True)
    """Threads that convert on each node; 0 is two for each CPU, at most 16."""
    checkpoint: Checkpoint = setting("newest", operational=True)
    """Checkpoint of the running training that target `snapshot` converts: `newest`, or `step_200`. The chain converts
    the last one, whatever stands here."""
    full_check: Truth = setting(False, operational=True)
    """Compare every tensor with the checkpoint bit for bit instead of a sample (operational: to check again,
    `--forcerun verify_model`)."""
