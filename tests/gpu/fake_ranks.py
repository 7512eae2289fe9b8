"""Real DeepSpeed over DeepSeek-V3's module tree with 256 ranks of which 255 are faked: what one rank's host does.

Collectives are torch's fake process group: launches and Python are real, no byte moves. Widths are scaled down, and
DeepSpeed's thresholds with them, so that gathers come as they would.
"""

import collections
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from check import Place, Row
from shapes import SMALL, published

from deepseek_sft.planning import zero_thresholds

WARM_UP, MEASURED = 3, 4  # micro batches; in the third ours sees what DeepSpeed does once it has learnt the order
SHAPE = (2, 16)  # of one, whose products take a CPU no time
FULL_SHARD = 8 * 2 * 7168 * 2048  # elements of w1w3 of eight experts
OFFLOADS = {"offload of both": ("optimizer", "param"), "offload of the optimizer": ("optimizer",)}


def rows(place: Place) -> list[Row]:
    world, layers = place.sizes(256, 8), place.sizes(61, 4)
    start(place.device, world)
    fewer = {"n_routed_experts": 32, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4} if place.small else {}
    base = scaled_base(place.work / "scaled", num_hidden_layers=layers, **fewer)
    found = []
    for name, offloaded in list(OFFLOADS.items())[: place.sizes(2, 1)]:
        figures = measured(place.device, base, offloaded)
        named = f"{name}: one micro batch of one rank's host"
        found.append(Row(named, figures["gathers"] > 0 and figures["scatters"] > 0, figures))
    return found


def start(device: str, world: int) -> None:
    """Become rank 0 of ``world`` ranks that are not there."""
    os.environ |= {"DS_ACCELERATOR": device, "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if device == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    from deepseek_sft.training.xtuner_engine import compat

    compat.install(device)
    import deepspeed
    from xtuner.parallel.sequence import init_sequence_parallel

    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", verbose=False)
    init_sequence_parallel(1)


def scaled_base(folder: Path, **changes) -> Path:
    """A folder with the published configuration, its widths scaled down."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published(**SMALL, **changes)))
    return folder


def scale_of(config: dict) -> float:
    """How many times the scaled shard the published one is."""
    return FULL_SHARD / (8 * 2 * config["moe_intermediate_size"] * config["hidden_size"])


def scaled_thresholds(config: dict, by_shard: bool, experts_per_shard: int) -> dict[str, int]:
    """Thresholds of the published sizes in proportion to the scaled shard."""
    scale = scale_of(config)
    full = zero_thresholds.of_model(published(), experts_per_shard, by_shard, False)
    return {
        "stage3_max_live_parameters": int(full.live / scale),
        "stage3_max_reuse_distance": int(full.reuse / scale),
        "stage3_prefetch_bucket_size": int(full.prefetched / scale),
        "reduce_bucket_size": int(full.reduced / scale),
    }


def measured(
    device: str,
    base: Path,
    offloaded: tuple[str, ...],
    ours: bool = True,
    experts_per_shard: int = 8,
    expert_parallel_size: int = 1,
    shape: tuple[int, int] = SHAPE,
) -> dict[str, Any]:
    """One micro batch of rank 0, the quickest of several after those in which DeepSpeed learns the order of modules.

    Args:
        base: of ``scaled_base``.
        offloaded: what is on the host, of ``optimizer`` and ``param``.
        shape: rows and tokens of each; of another than ``SHAPE`` experts are chosen evenly, to count what moves.
        ours: with this project's thresholds and collectives' calls; else as DeepSpeed does by itself.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from deepseek_sft.model import attention, training_model  # noqa: F401 (registers the attention functions)
    from deepseek_sft.training.xtuner_engine import lean_modules, zero_calls

    config = json.loads((base / "config.json").read_text())
    pinned = {"device": "cpu", "pin_memory": device == "cuda"}
    zero = {"stage": 3, "overlap_comm": device == "cuda", "contiguous_gradients": not ours}
    zero |= {"stage3_param_persistence_threshold": 100, "sub_group_size": int(1e9)}
    zero |= scaled_thresholds(config, ours, experts_per_shard)
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
        experts_per_shard=experts_per_shard,
        attention="sequence_parallel_sdpa",
        dtype=torch.bfloat16,
        products="auto",
        device=device,
        read_weights=False,
        expert_parallel_size=expert_parallel_size,
        exchange_rows=1 << 30,  # at once: the counts of a few tokens are more uneven than those of many
        ranks_per_node=8,
        keep_experts=True,
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
    if ours:
        zero_calls.ALONE = int(zero_calls.ALONE / scale_of(config))
        zero_calls.install(engine.module)
        if not lean_modules.install(engine.optimizer):
            raise RuntimeError("this DeepSpeed keeps its own way around modules")
        gc.collect()
        gc.freeze()
    engine.train()
    built = time.perf_counter() - started
    world = torch.distributed.get_world_size()
    if shape != SHAPE:
        choose_at_random()
    counts = count_gathers()
    count_exchanges(counts)
    ids = torch.randint(0, 1000, shape, device=device)
    timed = []
    for number in range(WARM_UP + MEASURED + 1):
        counts.clear()
        counts.on = number == WARM_UP + MEASURED  # in the last one, since it takes time that is not the host's
        forward, backward = micro_batch(device, engine, ids)
        if number >= WARM_UP and not counts.on:
            timed.append((forward + backward - counts["seconds"], forward, backward, counts["seconds"]))
    _, forward, backward, faked = min(timed)
    total = sum(parameter.ds_numel for parameter in model.parameters())
    spread = sum(p.ds_numel for p in model.parameters() if p.ds_zero_partition_world_size < world)
    figures = {
        "ranks": torch.distributed.get_world_size(),
        "layers": config["num_hidden_layers"],
        "forward s": round(forward, 3),
        "backward s": round(backward, 3),
        "in faked collectives s": round(faked, 3),
        "gathers": counts["gathers"],
        "scatters": counts["scatters"],
        "exchanges": counts["exchanges"],
        "rows of other nodes": counts["rows of other nodes"],
        "experts moved": round((counts["gathered experts"] + counts["scattered experts"]) / max(spread, 1), 3),
        "others moved": round((counts["gathered others"] + counts["scattered others"]) / (total - spread), 3),
        "gathered, of all parameters": round(counts["gathered"] / total, 3),
        "of it not prefetched": round(counts["exposed"] / total, 3),
        "build s": round(built, 1),
    }
    engine.destroy()
    del keep
    return figures


def choose_at_random() -> None:
    """Have routers choose by random scores: gathered weights are one rank's part again and again, experts all alike."""
    from deepseek_sft.model.router import Router

    if hasattr(Router, "by_scores"):
        return
    Router.by_scores = Router.choose
    Router.choose = lambda self, scores: self.by_scores(torch.rand_like(scores))


def _kind(group=None, *more, **named) -> str:
    """Of whose weights: experts that a part of the ranks share, or others."""
    group = named.get("group", group)
    return "others" if torch.distributed.get_world_size(group) == torch.distributed.get_world_size() else "experts"


class Arrived:
    """Stands for what ``all_to_all_single`` returns."""

    def wait(self) -> None:
        """Nothing was sent."""


def count_exchanges(counts: collections.Counter) -> None:
    """Count rows that expert parallelism sends; the fake group refuses to receive where this rank sends none."""
    from deepseek_sft.model import expert_parallel, node_exchange

    if hasattr(expert_parallel.dist, "counted"):
        return
    send = torch.distributed.all_to_all_single

    def counted(output, rows, received, sent, group=None, async_op=False):
        counts["exchanges"] += 1
        if not len(rows):
            return Arrived()
        return send(output, rows, received, sent, group=group, async_op=async_op)

    start = node_exchange.TokenExchange._start

    def started(self, rows, there, here, group):
        # Those of this rank's own tokens: what others send is not known here, and on average as much.
        if group is self.nodes.across and rows.shape[1] > 2 * self.top_k:
            sent = next(sent for sent, came in zip(self.sent, self.came, strict=True) if there in (sent, came))
            counts["rows of other nodes"] += sum(sent) - sent[self.nodes.node]
        return start(self, rows, there, here, group)

    node_exchange.TokenExchange._start = started
    torch.distributed.all_to_all_single = counted
    torch.distributed.counted = True


def clock(device: str) -> float:
    """Seconds; of a processor where nothing else is waited for, so that what else the machine does counts less."""
    return time.perf_counter() if device == "cuda" else time.process_time()


def micro_batch(device: str, engine, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward and a backward pass."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return clock(device)

    first = now()
    loss = engine(input_ids=ids).logits.float().square().mean()
    second = now()
    engine.backward(loss)
    engine.step()
    return second - first, now() - second


class Counts(collections.Counter):
    """Gathers and scatters of micro batches, while ``on``; the seconds of the faked collectives at any time."""

    on = True


def count_gathers() -> Counts:
    """Have DeepSpeed and ours count gathers and scatters, and what a layer needs that no prefetch has brought."""
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator

    from deepseek_sft.training.xtuner_engine import lean_gathers, zero_calls

    counts = Counts()
    coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
    if hasattr(coordinator, "counted"):
        return coordinator.counted
    gather, scatter = partition_parameters._dist_allgather_fn, coalesced_collectives._torch_reduce_scatter_fn
    our_gather, our_scatter = zero_calls._all_gather, zero_calls._reduce_scatter
    fetch, ours = coordinator._fetch_sub_module_impl, lean_gathers.PartitionedParameterCoordinator
    our_fetch = ours.before_module
    missing = partition_parameters.ZeroParamStatus.NOT_AVAILABLE

    def counted_gather(part, whole, *more, **named):
        count("gather", whole, *more, **named)
        return timed(gather, part, whole, *more, **named)

    def our_counted_gather(whole, part, group):
        count("gather", whole, group)
        return timed(our_gather, whole, part, group)

    def counted_scatter(whole, part, *more, **named):
        count("scatter", whole, *more, **named)
        return timed(scatter, whole, part, *more, **named)

    def our_counted_scatter(part, whole, group):
        count("scatter", whole, group)
        return timed(our_scatter, part, whole, group)

    def count(what, whole, *more, **named):
        if counts.on:
            counts[f"{what}s"] += 1
            counts[f"{what}ed"] += whole.numel()
            counts[f"{what}ed {_kind(*more, **named)}"] += whole.numel()

    def timed(call, *arguments, **named):
        begin = time.process_time()  # the fake group copies a rank's part once for each rank: no rank's host does
        result = call(*arguments, **named)
        counts["seconds"] += time.process_time() - begin
        return result

    def counting(fetch):
        def counted_fetch(self, module, *more, **named):
            if counts.on:
                for parameter in module.parameters(recurse=False):
                    if parameter.ds_status == missing:
                        counts["exposed"] += parameter.ds_numel
            return fetch(self, module, *more, **named)

        return counted_fetch

    partition_parameters._dist_allgather_fn = counted_gather
    coalesced_collectives._torch_reduce_scatter_fn = counted_scatter
    zero_calls._all_gather, zero_calls._reduce_scatter = our_counted_gather, our_counted_scatter
    coordinator._fetch_sub_module_impl, ours.before_module = counting(fetch), counting(our_fetch)
    coordinator.counted = counts
    return counts
