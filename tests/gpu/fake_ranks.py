"""Real DeepSpeed over DeepSeek-V3's module tree with 256 ranks of which 255 are faked: what one rank's host does.

Collectives are torch's fake process group: launches and Python are real, no byte moves. Widths are scaled down, and
DeepSpeed's thresholds with them, so that gathers come as they would.
"""

import collections
import json
import os
import time
from pathlib import Path

import torch
from check import Place, Row
from shapes import SMALL, published

FULL_SHARD = 8 * 2 * 7168 * 2048  # elements of w1w3 of eight experts
OFFLOADS = {"offload of both": ("optimizer", "param"), "offload of the optimizer": ("optimizer",)}


def rows(place: Place) -> list[Row]:
    os.environ |= {"DS_ACCELERATOR": place.device, "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(place.sizes(256, 8)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = int(os.environ["WORLD_SIZE"])
    if place.device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    from deepseek_sft.training.xtuner_engine import compat

    compat.install(place.device)
    import deepspeed
    from xtuner.parallel.sequence import init_sequence_parallel

    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("nccl" if place.device == "cuda" else "gloo", verbose=False)
    init_sequence_parallel(1)
    layers = place.sizes(61, 4)
    base = place.work / "scaled"
    base.mkdir()
    fewer = {"n_routed_experts": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4} if place.small else {}
    config = published(**SMALL, **fewer, num_hidden_layers=layers)
    (base / "config.json").write_text(json.dumps(config))
    found = []
    for name, offloaded in list(OFFLOADS.items())[: place.sizes(2, 1)]:
        found += measured(place, base, name, offloaded, world, layers)
    return found


def thresholds(config: dict, shard: int) -> dict[str, int]:
    """DeepSpeed's defaults in proportion to the scaled shard."""
    scale = FULL_SHARD / (8 * 2 * config["moe_intermediate_size"] * config["hidden_size"])
    defaults = {
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_prefetch_bucket_size": 5e7,
        "reduce_bucket_size": 5e8,
    }
    return {key: int(value / scale) for key, value in defaults.items()}


def measured(place: Place, base: Path, name: str, offloaded: tuple[str, ...], world: int, layers: int) -> list[Row]:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from deepseek_sft.model import attention, training_model  # noqa: F401 (registers the attention functions)

    config = json.loads((base / "config.json").read_text())
    pinned = {"device": "cpu", "pin_memory": place.device == "cuda"}
    zero = {"stage": 3, "overlap_comm": place.device == "cuda", "contiguous_gradients": True}
    zero |= {"stage3_param_persistence_threshold": 100, "sub_group_size": int(1e9), **thresholds(config, 8)}
    zero |= {f"offload_{what}": dict(pinned) for what in offloaded}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 16,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    keep = HfDeepSpeedConfig(settings)
    started = time.perf_counter()
    model = training_model.build(
        base,
        experts_per_shard=8,
        attention="sequence_parallel_sdpa",
        dtype=torch.bfloat16,
        products="auto",
        device=place.device,
        read_weights=False,
    )
    for parameter in model.parameters():
        parameter.ds_tensor.data.normal_(0, 0.02)
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True), config=settings
    )
    engine.train()
    built = time.perf_counter() - started
    counts = count_gathers()
    ids = torch.randint(0, 1000, (2, 16), device=place.device)
    for _ in range(3):
        counts.clear()
        forward, backward = micro_batch(place, engine, ids)
    total = sum(parameter.ds_numel for parameter in model.parameters())
    figures = {
        "ranks": world,
        "layers": layers,
        "forward s": round(forward, 3),
        "backward s": round(backward, 3),
        "gathers": counts["gathers"],
        "scatters": counts["scatters"],
        "gathered, of all parameters": round(counts["gathered"] / total, 3),
        "of it not prefetched": round(counts["exposed"] / total, 3),
        "build s": round(built, 1),
    }
    engine.destroy()
    del keep
    return [
        Row(f"{name}: one micro batch of one rank's host", counts["gathers"] > 0 and counts["scatters"] > 0, figures)
    ]


def micro_batch(place: Place, engine, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward and a backward pass."""

    def now() -> float:
        if place.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    first = now()
    loss = engine(input_ids=ids).logits.float().square().mean()
    second = now()
    engine.backward(loss)
    engine.step()
    return second - first, now() - second


def count_gathers() -> collections.Counter:
    """Have DeepSpeed count its gathers and scatters, and what a layer needs that no prefetch has brought."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator

    counts: collections.Counter = collections.Counter()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    if hasattr(coordinator, "counted"):
        return coordinator.counted
    gather, scatter = partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn
    fetch = coordinator._fetch_sub_module_impl
    missing = partition_parameters.ZeroParamStatus.NOT_AVAILABLE

    def counted_gather(part, whole, *more, **named):
        counts["gathers"] += 1
        counts["gathered"] += whole.numel()
        return gather(part, whole, *more, **named)

    def counted_scatter(*arguments, **named):
        counts["scatters"] += 1
        return scatter(*arguments, **named)

    def counted_fetch(self, module, *more, **named):
        for parameter in module.parameters(recurse=False):
            if parameter.ds_status == missing:
                counts["exposed"] += parameter.ds_numel
        return fetch(self, module, *more, **named)

    partition_parameters._dist_allgather_fn = counted_gather
    coalesced_collectives._torch_reduce_scatter_fn = counted_scatter
    coordinator._fetch_sub_module_impl = counted_fetch
    coordinator.counted = counts
    return counts
