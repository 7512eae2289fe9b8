"""How the model is trained."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from . import checkpoint_tiers, deepspeed_keys
from .checkpoint_tiers import CheckpointTier
from .field_types import (
    AboveZero,
    Count,
    NotNegative,
    Number,
    Positive,
    Share,
    Text,
    Truth,
    Variables,
    Whole,
    section,
    setting,
)

Beta = Annotated[Number, Ge(0), Lt(1)]


@section
class HangMinutes:
    start: AboveZero | None = None
    """Limit for loading or resuming, in minutes; null is 4 times the plan's slowest, at least 60."""
    step: AboveZero | None = None
    """Limit for one optimizer step, in minutes; null is 4 times the plan's slowest, at least 30, and from a start's
    fourth step on 4 times the measured median, at least 10."""
    save: AboveZero | None = None
    """Limit for saving a checkpoint, in minutes; null is 4 times the plan's, at least 60, and after the first one 4
    times the measured median, at least 10."""


@section
class EarlyStop:
    patience: Positive = 3
    """Measurements in a row without a lower validation loss after which the run ends."""
    min_delta: NotNegative = 0.0
    """By how much a loss must be lower to count as lower, in nats a token."""


@section
class Validation:
    every_steps: Positive = 100
    """Steps between two measurements of the validation loss; the base, before a run's first step, and a run's last step
    are always measured."""
    samples: Positive = 1000
    """At most so many of the held-out samples, chosen once for the experiment; one measurement takes about a quarter of
    the time of training on them."""
    early_stop: EarlyStop | None = None
    """End the run when the validation loss no longer falls. What is converted is then the committed checkpoint with the
    lowest validation loss, which is kept beside `keep_checkpoints`, however the run ends; `save_every_steps` must be a
    multiple of `every_steps`."""


@section
class Training:
    engine: Literal["xtuner"] = "xtuner"
    """Training engine."""
    strategy: Literal["zero3", "zero3_offload"] = setting("zero3_offload", topology=True)
    """DeepSpeed ZeRO-3, with optimizer states and parameters on the GPUs or in host memory."""
    offload: Literal["both", "optimizer", "parameters"] = setting("both", topology=True)
    """What `zero3_offload` keeps in host memory: optimizer states, parameters, or both."""
    sequence_parallel_size: Positive = setting(4, topology=True)
    """Ranks that share one sequence (Ulysses all-to-all over heads); divides the ranks of a node and the heads."""
    micro_batch_size: Positive = setting(2, topology=True)
    """Samples per sequence-parallel group and forward pass."""
    gradient_accumulation_steps: Positive = setting(16, topology=True)
    """Forward passes per optimizer step."""
    accumulate_by: Literal["rows", "samples"] = setting("rows", later=True, topology=True)
    """What `gradient_accumulation_steps` counts micro batches of: rows as they are, or samples: then fewer are made of
    packed rows, so that a step trains on as many samples and tokens as unpacked (`round(steps × rows / samples)`)."""
    deal_rows: Literal["cost", "order"] | None = setting(None, later=True, topology=True)
    """How the rows of a step are dealt: by what they cost to compute, so that those stand side by side that take alike
    and no group waits, or in the order of the data. `null` is `cost` for a new run, while a run begun before this key
    goes on as it was. The step's rows and its loss are the same."""
    zero_thresholds: Literal["shard", "deepspeed"] | None = setting(None, later=True, topology=True)
    """How much ZeRO-3 gathers ahead and holds at once: what the experts' shards ask for, so that no gather waits, or
    DeepSpeed's defaults. `null` is `shard` for a new run, while a run begun before this key goes on as it was."""
    gradient_accumulation_dtype: Literal["bfloat16", "float32"] = "float32"
    """In what gradients of several forward passes are added up; float32 takes 2 bytes per parameter more, over all
    ranks, and loses nothing."""
    gradient_communication_dtype: Literal["float32", "bfloat16"] | None = setting(None, later=True)
    """In what gradients are summed over the ranks. `null` is float32 for a new run, while a run begun before this key
    goes on as it was. bfloat16 moves a fifth less in all; over 256 ranks its sums are 1.9 % off or more
    (docs/training.md)."""
    deepspeed: dict[str, Any] | None = setting(None, later=True)
    """Keys merged last into DeepSpeed's configuration, such as `{zero_optimization: {stage3_prefetch_bucket_size:
    400000000}}`; those are refused that a key of ours sets or that resume and conversion depend on (docs/training.md).
    Setting it begins a new run."""
    epochs: AboveZero = 1
    """Passes over the samples."""
    max_steps: Positive | None = None
    """End after this many optimizer steps, whatever `epochs` says."""
    max_hours: AboveZero | None = setting(None, same_run=True)
    """End early after this many hours of training over all starts, start-up and lost work not counted. The last step is
    saved and the run counts as done; the learning rate still follows the planned steps. A larger value continues the
    same run."""
    validation: Validation | None = setting(None, later=True, same_run=True)
    """Measure the loss of the held-out samples (`data.held_out`) while training, `{every_steps: 100}`, and perhaps end
    early by it. Training itself is the same to the bit with and without; setting it goes on with a begun run."""
    learning_rate: AboveZero = 2e-07
    """Peak learning rate."""
    min_learning_rate: NotNegative = 0.0
    """Learning rate at the end of the cosine."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule after the warm-up."""
    warmup_ratio: Share = 0.03
    """Share of the steps that warm up linearly (at least one step)."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay."""
    max_grad_norm: AboveZero = 1.0
    """Gradients are clipped to this global norm."""
    optimizer: Literal["adamw", "cpu_adam"] = "adamw"
    """AdamW of torch, or DeepSpeed's for states in host memory (compiled at the first start: needs a C++ compiler and,
    on GPUs, the CUDA toolkit of `CUDA_HOME` on the nodes)."""
    experts_per_shard: Positive | Literal["auto"] = setting(8, topology=True)
    """Routed experts per fused parameter; divides their number. `auto` is as many as 1.5 GB of weights hold, at least
    four shards a layer (16 of the 671B model): fewer and larger gathers; a begun experiment keeps its number."""
    expert_parallel_size: Positive | Literal["auto"] = setting(1, later=True, topology=True)
    """Ranks over which a layer's routed experts are spread, neighbours first; rows travel to them (docs/training.md). 1
    spreads none. Divides the ranks of all nodes and the shards of a layer; divides a node's ranks or is a multiple.
    `auto` is the plan's choice when a run begins, which the run then keeps."""
    exchange_rows: Positive | None = setting(None, operational=True, later=True)
    """Rows of other ranks that a rank receives and multiplies at once with expert parallelism; null is 32,768. Less
    takes less memory and more collectives."""
    expert_products: Literal["auto", "grouped", "loop"] = "auto"
    """Matrix products of a shard's experts: one grouped product or one product each; `auto` is grouped in bfloat16 on
    GPUs from Hopper on."""
    keep_layer_gathered: Truth = setting(False, operational=True)
    """Keep a layer's weights from its recomputation to its backward pass: a quarter less traffic, one whole layer more
    on every GPU (23 GB for 671B). Results are the same."""
    auxiliary_loss_weight: NotNegative = 0.0
    """Weight of the sequence-wise balance loss; 0 is off."""
    balance_bias_speed: NotNegative = 0.0
    """Change of the routers' balance bias per step by the rule of DeepSeek-V3's pre-training (0.001 there); 0 leaves
    the base's biases as they are."""
    freeze: tuple[Literal["router"], ...] = setting((), later=True)
    """What stays as in the base: `[router]` is the routers' weights, whose gradients are zero; needs weight_decay 0 and
    balance_bias_speed 0. verify_model proves it. Setting it begins a new run."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of parameters and activations; master weights are always fp32."""
    activation_checkpointing: Truth = True
    """Recompute each layer's activations in the backward pass."""
    recompute: Literal["full", "without_attention", "without_experts"] = setting("full", operational=True, later=True)
    """What of a layer is recomputed: all of it, or all but attention's kernel, whose output is kept for every layer: an
    eighth less to compute on rows of 32,768 tokens, for 3 GB more per 1,000 tokens of a rank (671B); or, where expert
    parallelism lies over several nodes, all but the routed experts: two of seven exchanges less, for 0.8 GB more per
    1,000 tokens. Results are the same."""
    attention: Literal["auto", "sdpa", "flash"] = "auto"
    """Attention kernel. `auto` takes what torch brings: SDPA, on Hopper by cuDNN with values unpadded, and torch's
    variable-length kernel for packed short samples; `flash` is the package flash-attn, which is in no lock."""
    seed: Count = 42
    """Seed of the sample order."""
    deterministic: Truth = setting(False, later=True)
    """Kernels that give the same bits every time; on GPUs slower, and what resumes there equals the unbroken run to the
    bit with it alone. CPUs do either way."""
    save_every_steps: Positive = setting(100, operational=True)
    """A checkpoint every so many steps (operational: re-runs nothing)."""
    save_every_minutes: AboveZero | None = setting(None, operational=True)
    """And one whenever this many minutes have passed since the last; null saves by steps alone."""
    async_save: Literal["auto", "off"] | None = setting(None, operational=True, later=True)
    """Whether a checkpoint is written while the next step computes: `auto` lets only its update wait for what is not
    yet written; the last one and the one of a stop are written at once. `off` stops the GPUs until it is written. The
    files are the same. `null` is `auto` for a new run, while a run begun before this key goes on with `off`."""
    keep_checkpoints: Positive = setting(2, operational=True)
    """Newest checkpoints kept."""
    checkpoints: tuple[CheckpointTier, ...] = setting((), operational=True, later=True)
    """Several folders with a cadence each: `[{path: /local, every_minutes: 15}, {every_minutes: 240, keep: 2}]` saves
    often on each node's own disk, with a copy on the next node, and now and then on the shared storage, where results
    lie (docs/training.md). Empty is the shared storage alone."""
    log_every_steps: Positive = setting(1, operational=True)
    """Steps between lines of metrics."""
    first_loss_max: AboveZero | None = setting(None, operational=True)
    """Stop with a failed gate when the first step's loss is above this: a base model that is loaded wrong shows
    here."""
    on_not_finite: Literal["stop", "skip"] = setting("stop", operational=True)
    """A step whose loss or gradient norm is not finite: `stop` with a failed gate, or `skip` its update and go on.
    Neither changes the weights."""
    spike_factor: Annotated[Number, Gt(1)] | None = setting(10.0, operational=True)
    """A step whose gradient norm is above this many times the median of the last 50 is a spike; null looks for none."""
    on_spike: Literal["warn", "skip", "stop"] = setting("warn", operational=True)
    """A spike: note it, `skip` its update, or `stop` with a failed gate."""
    slow_rank_percent: AboveZero | None = setting(None, operational=True, later=True)
    """A rank that computes this many percent slower than the median for 20 steps is named, and the next start leaves
    its node out; null is 10 on GPUs and judges nothing on CPU."""
    hang_minutes: HangMinutes | None = setting(None, operational=True)
    """A rank that makes no progress for this long writes where each of its threads stands, and ends the job; null
    derives the limits from the plan's slowest times, then from measured ones."""
    check_base: Literal["auto", "always", "never"] = setting("auto", operational=True, later=True)
    """Before a run begins, compare the base's files with the sums that prepare_model wrote, each file on one rank:
    `auto` where no rank reads more than 32 GiB for it."""
    on_new_topology: Literal["continue", "refuse"] = setting("refuse", operational=True, later=True)
    """A begun run goes on with other ranks or keys of topology from the rows that it has done. Where its steps would be
    of another number of rows: `refuse` says so before anything is trained, `continue` goes on with the new schedule,
    whose learning rate follows rows."""
    run_name: Text = ""
    """Any text; another one forces a new run of the same settings."""

    def problems(self) -> Iterator[str]:
        yield from deepspeed_keys.problems(self.deepspeed)
        yield from checkpoint_tiers.problems(self)
        if self.optimizer == "cpu_adam" and (self.strategy != "zero3_offload" or self.offload == "parameters"):
            yield (
                "optimizer: `cpu_adam` needs optimizer states in host memory; set strategy `zero3_offload` and offload "
                "`both` or `optimizer`"
            )
        if self.recompute != "full" and (not self.activation_checkpointing or self.attention == "flash"):
            yield (
                f"recompute: `{self.recompute}` needs activation_checkpointing and attention `auto` or `sdpa`; set "
                "those, or recompute: full"
            )
        if self.freeze and self.weight_decay > 0:
            yield "freeze: AdamW's weight decay would move what is frozen; set weight_decay: 0, or freeze: []"
        if self.freeze and self.balance_bias_speed > 0:
            yield "freeze: balance_bias_speed moves the routers' biases; set it to 0, or freeze: []"
        if self.validation and self.validation.early_stop:
            every = self.validation.every_steps
            if self.save_every_steps % every:
                yield (
                    f"validation.early_stop: checkpoints of steps that are not measured could not be chosen; "
                    f"save_every_steps {self.save_every_steps} must be a multiple of validation.every_steps {every}"
                )
        if self.min_learning_rate > self.learning_rate:
            yield "min_learning_rate: is above learning_rate"


@section
class Train(Training):
    """What the configuration says: training's own settings, and those of its job."""

    ranks_per_node: Positive | None = setting(None, topology=True)
    """Ranks per node on CPU; on GPUs it is the number of GPUs and this must be null."""
    spare_nodes: Annotated[Whole, Ge(0), Le(64)] = setting(0, operational=True)
    """Nodes that training's job asks for beyond `nodes` of the profile: preflight picks the best, the others are given
    back before training starts."""
    environment: Variables = setting({}, operational=True)
    """Environment variables of every training process: network interfaces (NCCL_SOCKET_IFNAME), InfiniBand
    (NCCL_IB_HCA), debugging."""
    secrets_file: Text | None = setting(None, operational=True, later=True)
    """File of mode 0600 with one `NAME=VALUE` a line: variables of every training process that nobody else may read
    (tokens, proxies with a password). It is read on each node."""

    def problems(self) -> Iterator[str]:
        yield from Training.problems(self)
        if self.on_spike != "warn" and self.spike_factor is None:
            yield (
                f"on_spike: `{self.on_spike}` needs spikes to be looked for; give `spike_factor` a number (10.0), or "
                "write on_spike: warn"
            )
        if self.warmup_ratio == 1 and self.lr_schedule == "cosine":
            yield "warmup_ratio: 1 leaves no step for the cosine"
