"""Ranks of ``benchmarks/train.py``, run by the train environment's Python; ``tests`` and ``workflow`` on its path.

Usage: train_worker.py CASES.json OUTPUT
CASES is a list of {"name", "kind", "ranks", "base", "tokens", "threads", "zero", "settings"}; one after another.
Rank 0 writes its figures to OUTPUT/<name>.json.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import training_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Counter(TorchDispatchMode):
    """Collectives, their bytes, and operations of matrix products on this rank.

    Bytes are those that a rank must receive: of a gather, a reduce-scatter and an all-to-all the whole tensor but its
    own part, of an all-reduce twice that.
    """

    def __init__(self, ranks: int):
        super().__init__()
        self.share = (ranks - 1) / ranks
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, float] = defaultdict(float)
        self.operations: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        name = function.name()
        if name.startswith("c10d::"):
            largest = max(_sizes(arguments), default=0)  # of a gather the output, of a reduce-scatter the input
            self.calls[name] += 1
            self.bytes[name] += largest * self.share * (2 if "allreduce" in name else 1)
        elif formula := flop_registry.get(function.overloadpacket):
            self.operations[name] += formula(*arguments, **options, out_val=result)
        return result


def _sizes(values: Any) -> list[int]:
    sizes = []
    for value in values:
        if isinstance(value, torch.Tensor):
            sizes.append(value.nbytes)
        elif isinstance(value, list | tuple):
            sizes.append(sum(_sizes(value)))
    return sizes


def count(run, case: dict[str, Any]) -> dict[str, Any]:
    """Figures of one step, after two in which DeepSpeed learns the order of modules."""
    run.step()
    run.step()
    counter = Counter(case["ranks"])
    with counter:
        run.step()
    return {"calls": counter.calls, "bytes": counter.bytes, "operations": counter.operations}


def memory(run, case: dict[str, Any]) -> dict[str, Any]:
    """Most bytes that torch has allocated at once in a forward and backward pass above what it held before.

    The update is left out: its memory does not depend on tokens, and on one rank it holds the whole model in fp32.
    """
    (batch,) = run.batches(0)
    begin = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.engine.backward(run.engine(batch) / batch.trained_tokens)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return {"peak": peak, "events": len(events), "seconds": time.perf_counter() - begin}


def speed(run, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and phases of the fastest of three steps after two."""
    results = []
    for _ in range(5):
        run.step()
        results.append(run.result)
    best = min(results[2:], key=lambda result: result.seconds)
    left, right = torch.randn(2048, 512).bfloat16(), torch.randn(512, 2048).bfloat16()
    rates = []
    for _ in range(20):
        begin = time.perf_counter()
        left @ right
        rates.append(2 * 2048 * 512 * 2048 / (time.perf_counter() - begin) / 1e9)
    return {"seconds": best.seconds, "phases": best.phases, "gflop_per_second": max(rates)}


def lockstep(run, case: dict[str, Any]) -> dict[str, Any]:
    """Tokens and seconds of one step of ``case["groups"]`` data-parallel groups, of which ranks stand for two.

    In each turn all groups wait for the one whose micro batch takes longest. The ranks compute the two longest of each
    turn, so that they take as long as all would. Before it a step of a few tokens, in which DeepSpeed learns the order
    of modules, and what is built is built.
    """
    from deepseek_sft.data import dealing
    from deepseek_sft.training.schedule import rows_from
    from deepseek_sft.training.xtuner_engine import micro_batches

    settings, known = run.settings, run.rows.rows
    shape = settings.gradient_accumulation_steps, case["groups"], settings.micro_batch_size
    chosen = rows_from(len(known), settings.seed, 0, shape[0] * shape[1] * shape[2])
    if settings.deal_rows == "cost":
        costs = known.of(chosen).costs(run.rows.pairs_per_token)
        dealt = chosen[dealing.deal(costs, shape[2], shape[0], shape[1], settings.seed, 1)]
    else:
        dealt = chosen.reshape(shape)
    longest = known.lengths[dealt].max(axis=2) * run.rows.pairs_per_token * shape[2] + known.pairs[dealt].sum(axis=2)
    group = np.argsort(-longest, axis=1, kind="stable")[:, torch.distributed.get_rank()]
    rows = [run.rows.dataset[int(row)] for turn in range(shape[0]) for row in dealt[turn, group[turn]]]
    batches = micro_batches.collate(rows, shape[2], 1)
    few = [{key: row[key][:8] for key in ("input_ids", "labels")} | {"sample_lengths": [8]} for row in rows]
    run.batches = lambda step: batches if step else micro_batches.collate(few, shape[2], 1)
    run.step()
    begin = time.process_time()
    run.step()
    tokens = int(known.lengths[dealt].sum())
    return {
        "tokens": tokens,
        "seconds": run.result.seconds,
        "processor seconds": time.process_time() - begin,
        "phases": run.result.phases,
        "useful": tokens / dealing.slots(known.lengths[dealt]),
        "computed slots": sum(batch.valid.numel() for batch in batches),
    }


def native(run, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a plain script's step on the same rows: transformers' modules, MoE layers as ZeRO-3's leaf modules,
    logits of all positions at once."""
    import deepspeed
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import stage3
    from transformers import DeepseekV3ForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    options = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "contiguous_gradients": True} | case["zero"],
    }
    stage3.reduce_scatter_coalesced = (
        coalesced_collectives.reduce_scatter_coalesced
    )  # a plain script has DeepSpeed's own
    kept = HfDeepSpeedConfig(options)
    model = DeepseekV3ForCausalLM.from_pretrained(case["base"], dtype=torch.bfloat16, attn_implementation="sdpa")
    model.train().config.use_cache = False
    model.gradient_checkpointing_enable()
    deepspeed.utils.set_z3_leaf_modules(model, [DeepseekV3MoE])
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    seconds = []
    for step in range(5):
        (batch,) = run.batches(step)
        begin = time.perf_counter()
        logits = engine(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
        engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - begin)
    del kept
    return {"seconds": min(seconds[2:])}


KINDS = {"count": count, "memory": memory, "speed": speed, "lockstep": lockstep, "native": native}


def run_case(case: dict[str, Any], output: Path) -> None:
    """One case, on each rank of its group."""
    from training_engine import engine

    torch.set_num_threads(case["threads"])
    with engine(Path(case["base"]), Path(case["tokens"]), zero=case["zero"], **case["settings"]) as run:
        figures = {"bytes_read": run.model.llm.bytes_read} | KINDS[case["kind"]](run, case)
    if torch.distributed.get_rank() == 0:
        (output / f"{case['name']}.json").write_text(json.dumps(figures))


def main(cases: list[dict[str, Any]], output: Path) -> None:
    training_ranks.import_libraries()
    for case in cases:
        begin = time.monotonic()
        training_ranks.group(case["ranks"], run_case, output / f"meeting-{case['name']}", case, output)
        print(f"{case['name']}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
