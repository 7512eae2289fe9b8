"""Cost of training: what is counted carries over to GPUs, what is timed is printed only.

    .envs/dev/bin/python benchmarks/train.py                 all, a few minutes, two cores and 8 GiB
    .envs/dev/bin/python benchmarks/train.py count memory    parts of it
    .envs/dev/bin/python benchmarks/train.py scale           256 faked ranks of 671B: host seconds, gathers, exposure
    .envs/dev/bin/python benchmarks/train.py exchange        the same with experts over 64 ranks: terabytes into a node
    .envs/dev/bin/python benchmarks/train.py skew            all tokens on one rank's experts: memory, and exactness
    .envs/dev/bin/python benchmarks/train.py demo_experts    the demo, experts over 1, 2, 4 ranks: seconds a step
    .envs/train/bin/python benchmarks/train.py --products    loop against grouped products on this machine's device

A model of 100 M parameters in DeepSeek-V3's shape (head sizes 192 and 128, 32 experts, YaRN), random weights, in a
temporary folder. DeepSpeed's thresholds are scaled down as the model is against 671B, else it would keep everything
gathered. The exit code is 0 only if every counted bar is met.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from demo_experts import demo_experts
from faked_ranks import exchange, faked
from padding import padding
from skew import skew

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "workflow"))
SHAPE = {
    "hidden_size": 512,
    "layers": 5,
    "heads": 4,
    "routed_experts": 32,
    "experts_per_token": 4,
    "moe_intermediate_size": 256,
    "intermediate_size": 1408,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 32768,
    "initializer_range": 0.02,
}
# The release's numbers of experts, groups and experts per token, each expert small: what running many experts costs.
MANY_EXPERTS = SHAPE | {
    "layers": 4,
    "routed_experts": 256,
    "groups": 8,
    "groups_used": 4,
    "experts_per_token": 8,
    "moe_intermediate_size": 64,
}
# DeepSpeed's defaults times 100 M / 671 G parameters.
ZERO = {
    "stage3_max_reuse_distance": 150_000,
    "stage3_max_live_parameters": 150_000,
    "stage3_prefetch_bucket_size": 7_500,
    "stage3_param_persistence_threshold": 15,
    "reduce_bucket_size": 75_000,
}
EXPERT_SHARDS = 8  # of a layer, for the timed models
KEPT = {key: value for key, value in ZERO.items() if "reuse" not in key and "live" not in key}
SETTINGS = {"dtype": "bfloat16", "micro_batch_size": 1, "experts_per_shard": 4, "learning_rate": 1e-5}
RANKS, LENGTH, LENGTHS, SAMPLE, SPEED_LENGTH = 2, 512, (4096, 8192, 16384), 4096, 2048
ADVISED: dict[str, dict[str, Any]] = {  # settings that ``planning/recommend.py`` may name
    "as given": {},
    "micro batch 2": {"micro_batch_size": 2},
    "twice the experts a shard": {"experts_per_shard": 8},
    "attention kept": {"recompute": "without_attention"},
}
OLD, NEW = "DeepSpeed's own", "ours"  # with as many experts a shard as the configuration: 8 before, auto now
LOOP_SECONDS = 0.5  # of ten million additions in Python, on the processors that host seconds are told for
HOST_BAR, SPREAD_BAR = 4.0, 2.5  # seconds
SPREAD = "ours, experts spread over 8 ranks"
WIRE_BAR, OPERATIONS_BAR, READ_BAR, SLOPE_BAR = 1.05, 1.1, 1.05, 0.05
BYTES = 2  # of a bf16 element


class Bench:
    """Inputs in a folder, and what was measured against its bar."""

    def __init__(self, folder: Path, sizes: dict[str, Any] | None = None):
        from deepseek_sft.convert import tiny_model
        from deepseek_sft.families import deepseek_v3

        self.folder, self.missed, self.layers, self.steps = folder, 0, 61, 60
        self.sizes = sizes or SHAPE
        shape = tiny_model.TinyShape(**self.sizes)
        self.base = folder / "base"
        tiny_model.write_tiny(self.base, shape, 0, 50_000_000)
        self.config = tiny_model.config_of(shape)
        specs = deepseek_v3.tensor_specs(self.config)
        self.parameters = sum(s.elements for n, s in specs.items() if not n.endswith(deepseek_v3.CORRECTION_BIAS))
        self.release_bytes = sum(spec.elements * (4 if spec.dtype == "F32" else 2) for spec in specs.values())
        # Elements of the matrices that a token passes through, without embedding and output layer.
        self.per_token = sum(
            spec.elements
            * (self.sizes["experts_per_token"] / self.sizes["routed_experts"] if ".mlp.experts." in name else 1)
            for name, spec in specs.items()
            if len(spec.shape) == 2 and not name.startswith(("model.embed_tokens", "lm_head"))
        )
        print(f"model: {self.parameters / 1e6:.1f} M parameters, {self.per_token / 1e6:.1f} M used per token in layers")

    def tokens(self, length: int, rows: int, trained: float = 1.0) -> Path:
        """Rows of one length, in samples of ``SAMPLE`` tokens; ``trained``: share with loss, at its end."""
        from deepseek_sft.data import tokens

        target = self.folder / f"tokens-{length}-{trained}"
        if not target.exists():
            target.mkdir()
            random = np.random.default_rng(0)
            writer = tokens.TokenWriter(target)
            samples = np.full(max(1, length // SAMPLE), min(length, SAMPLE), np.int32)
            for number in range(rows):
                ids = random.integers(2, SHAPE["vocab_size"], length).astype(np.int32)
                labels = np.where(np.arange(length) >= length * (1 - trained), ids, -100).astype(np.int32)
                writer.add(f"row-{number}", ids, labels, samples)
            shards = writer.close()
            figures = {"rows": rows, "samples": rows * len(samples), "tokens": rows * length, "longest": length}
            tokens.write_index(target, {"shards": shards, "vocab_size": SHAPE["vocab_size"]} | figures)
        return target

    def rows_of(self, name: str, rows: list[list[int]]) -> Path:
        """Rows of samples of these lengths, all trained."""
        from deepseek_sft.data import tokens

        target = self.folder / f"tokens-{name}"
        target.mkdir()
        random, writer = np.random.default_rng(1), tokens.TokenWriter(target)
        for number, samples in enumerate(rows):
            ids = random.integers(2, SHAPE["vocab_size"], sum(samples)).astype(np.int32)
            writer.add(f"row-{number}", ids, ids, np.array(samples, np.int32))
        figures = {"rows": len(rows), "samples": sum(map(len, rows)), "longest": max(map(sum, rows))}
        tokens.write_index(target, {"shards": writer.close(), "vocab_size": SHAPE["vocab_size"]} | figures)
        return target

    def run(self, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Run cases (``train_worker.py``) in one launch; rank 0's figures of each."""
        defaults = {"base": str(self.base), "threads": 1, "ranks": RANKS, "zero": ZERO}
        listed = [
            defaults | case | {"name": name, "settings": SETTINGS | case.get("settings", {})}
            for name, case in cases.items()
        ]
        (self.folder / "cases.json").write_text(json.dumps(listed, default=str))
        worker = [PROJECT / ".envs/train/bin/python", PROJECT / "benchmarks/train_worker.py"]
        paths = f"{PROJECT / 'workflow'}:{PROJECT / 'tests'}"
        variables = {
            "PYTHONPATH": paths,
            "DS_ACCELERATOR": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if subprocess.run(
            [*worker, self.folder / "cases.json", self.folder], env=os.environ | variables, stdout=2, check=False
        ).returncode:
            sys.exit("a case failed")
        return {name: json.loads((self.folder / f"{name}.json").read_text()) for name in cases}

    def bar(self, what: str, ratio: float, limit: float) -> None:
        """Print a ratio, and count it as missed where it is above its limit."""
        met = ratio <= limit
        self.missed += not met
        print(f"  {what}: {ratio:.3f} (bar {limit}){'' if met else '  MISSED'}")


def count(bench: Bench) -> None:
    """Traffic, collectives, operations and bytes read, of one micro-step on one of two ranks."""
    tokens = bench.tokens(LENGTH, 6)
    found = bench.run(
        {
            "kept": {
                "kind": "count", "tokens": tokens, "zero": KEPT, "settings": {"keep_layer_gathered": True}
            },
            "again": {"kind": "count", "tokens": tokens},
            "split": {
                "kind": "count", "tokens": bench.tokens(2 * LENGTH, 6), "settings": {"sequence_parallel_size": 2}
            },
        }
    )  # fmt: skip
    share = (RANKS - 1) / RANKS
    whole = bench.parameters * BYTES * share
    print(f"counted per micro-step and rank: {RANKS} ranks, {LENGTH} tokens each, bf16, activation checkpointing")
    for name, gathers, what in (
        ("kept", 2, "keep_layer_gathered: ZeRO-3's 2 gathers and 1 reduce-scatter"),
        ("again", 3, "default: gathered again for the recomputation, 3 and 1"),
    ):
        moved = found[name]["bytes"]
        parts = {part: sum(v for k, v in moved.items() if part in k) / whole for part in ("gather", "reduce_scatter")}
        print(f" {what} of {whole / 1e6:.1f} MB")
        print(f"  gathered {parts['gather']:.3f} times, reduced {parts['reduce_scatter']:.3f} times")
        print(f"  collectives: {sum(found[name]['calls'].values())}, {dict(sorted(found[name]['calls'].items()))}")
        bench.bar("bytes on the wire / theory", sum(moved.values()) / ((gathers + 1) * whole), WIRE_BAR)
    exchanged = sum(size for name, size in found["split"]["bytes"].items() if "alltoall" in name)
    size = SHAPE["qk_nope_head_dim"] + 64
    heads = SHAPE["heads"] * (2 * size + 2 * SHAPE["v_head_dim"])
    theory = 3 * SHAPE["layers"] * LENGTH * heads * BYTES * share
    print(f" sequence parallel 2: all-to-all of query, key, value and output in three passes, {theory / 1e6:.1f} MB")
    bench.bar("bytes on the wire / theory", exchanged / theory, WIRE_BAR)

    operations = found["again"]["operations"]
    products = sum(number for name, number in operations.items() if "attention" not in name)
    head = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    print(" matrix products, counted by operator:", {k: f"{v / 1e9:.1f} G" for k, v in sorted(operations.items())})
    formula = 2 * (4 * LENGTH * bench.per_token + 3 * (LENGTH - 1) * head)
    bench.bar("operations / formula with recomputation (4 passes, output layer 3)", products / formula, OPERATIONS_BAR)
    without = 2 * 3 * (LENGTH * bench.per_token + (LENGTH - 1) * head)
    print(f"  against the formula without recomputation: {products / without:.3f}")
    read = found["again"]["bytes_read"]
    print(f" loading: {read / 1e6:.1f} MB of {bench.release_bytes / 1e6:.1f} MB read by a rank; stock xtuner: all")
    bench.bar("bytes read / (release / ranks)", read / (bench.release_bytes / RANKS), READ_BAR)


def expected_slope(bench: Bench, settings: dict[str, Any]) -> tuple[float, str]:
    """Bytes per token by the plan's own formulas."""
    from deepseek_sft.planning import device_memory
    from deepseek_sft.planning.counting import count as count_model
    from deepseek_sft.planning.settings import Training
    from deepseek_sft.planning.terms import total

    model = count_model(bench.config)
    chosen = {"experts_per_shard": SETTINGS["experts_per_shard"]} | settings
    training = Training(
        "zero3", 1, chosen.get("micro_batch_size", 1), 1, 1, None, chosen["experts_per_shard"], "bfloat16", True, 1, 1
    )
    training = dataclasses.replace(training, recompute=chosen.get("recompute", "full"))
    inputs = BYTES * SHAPE["hidden_size"] * SHAPE["layers"]
    kept = SHAPE["layers"] * device_memory.kept_attention_per_token(model, training).value
    saved = total(device_memory.saved_per_token(model, training, moe=True))
    backward = device_memory.backward_per_token(model, training, moe=True).value
    words = f"layer inputs {inputs} + attention kept {kept:.0f} + recomputed layer {saved:.0f} + its backward pass "
    return inputs + kept + saved + backward, f"{words}{backward:.0f}"


def memory(bench: Bench) -> None:
    """Peak allocation against tokens, on one rank, for each setting that the plan advises."""
    logits = SHAPE["vocab_size"] * (BYTES + 4)
    print(
        f"peak allocation of a forward and backward pass, one rank, rows of samples of {SAMPLE} tokens, all trained;"
        f" logits at once would be {logits} bytes a token"
    )
    for name, settings in ADVISED.items():
        rows = settings.get("micro_batch_size", 1)
        cases = {
            f"memory-{name}-{length}": {
                "kind": "memory",
                "tokens": bench.tokens(length // rows, rows),
                "ranks": 1,
                "threads": 2,
                "settings": settings,
            }
            for length in LENGTHS
        }
        peaks = [figures["peak"] for figures in bench.run(cases).values()]
        slopes = [(b - a) / (m - n) for a, b, n, m in zip(peaks, peaks[1:], LENGTHS, LENGTHS[1:], strict=False)]
        expected, words = expected_slope(bench, settings)
        shown = ", ".join(
            f"{length} tokens {peak / 2**20:.0f} MiB" for length, peak in zip(LENGTHS, peaks, strict=True)
        )
        print(f" {name}: {shown}; {slopes[0]:.0f} and {slopes[1]:.0f} bytes a token")
        print(f"  expected: {words} = {expected:.0f}")
        # The loss is the peak of short rows, a layer's backward pass that of long ones, to which the slope rises.
        bench.bar("|largest slope / expected - 1|", abs(max(slopes) / expected - 1), SLOPE_BAR)


def speed(bench: Bench) -> None:
    """Tokens per second against a plain script on transformers' modules; half of the tokens carry loss."""
    _speed(bench)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        _speed(Bench(Path(folder), MANY_EXPERTS))


def _speed(bench: Bench) -> None:
    tokens = bench.tokens(SPEED_LENGTH, 12, 0.5)
    case = {"tokens": tokens, "settings": {"experts_per_shard": bench.sizes["routed_experts"] // EXPERT_SHARDS}}
    found = bench.run({kind: case | {"kind": kind} for kind in ("speed", "native")})
    ours, theirs = found["speed"]["seconds"], found["native"]["seconds"]
    rate = RANKS * SPEED_LENGTH
    experts = f"{bench.sizes['experts_per_token']} of {bench.sizes['routed_experts']} experts per token"
    print(f"timed (printed only): {RANKS} ranks × 1 thread, rows of {SPEED_LENGTH} tokens, {experts}, checkpointing")
    print(f"  ours {rate / ours:.0f} tokens/s, native modules {rate / theirs:.0f}: {theirs / ours:.2f} ×")
    shares = ", ".join(f"{phase} {seconds / ours:.0%}" for phase, seconds in found["speed"]["phases"].items())
    head = SHAPE["vocab_size"] * SHAPE["hidden_size"]
    operations = 2 * (4 * SPEED_LENGTH * bench.per_token + 3 * SPEED_LENGTH / 2 * head)
    print(f"  time: {shares}; {operations / ours / 1e9:.1f} GFLOP/s per rank in matrix products alone")
    measured = found["speed"]["gflop_per_second"]
    print(f"  this machine: {measured:.1f} GFLOP/s per rank in a bf16 product of 2048 × 512 × 2048, both ranks at once")


def scale(bench: Bench) -> None:
    """What one rank's host does in a micro batch of 671B on 256 ranks, the others faked: before and after."""
    layers = bench.layers
    found = {}
    for name, shard, parallel, kind in (
        (OLD, 8, 1, "stock"),
        ("ours, 8 a shard", 8, 1, "ours"),
        (NEW, 16, 1, "ours"),
        (SPREAD, 16, 8, "ours"),
    ):
        found[name] = faked(layers, shard, parallel, kind)
    print(f"one micro batch of rank 0 of 256 faked ranks, {layers} layers, real DeepSpeed, widths scaled down, CPU")
    seconds = {}
    for name, figures in found.items():
        spent = figures["forward s"] + figures["backward s"] - figures["in faked collectives s"]
        seconds[name] = spent * LOOP_SECONDS / figures["loop s"]
        late = figures["of it not prefetched"] / figures["gathered, of all parameters"]
        print(
            f"  {name:18} host {seconds[name]:5.2f} s ({spent:.2f} s here, where ten million additions take "
            f"{figures['loop s']:.2f} s and not {LOOP_SECONDS} s), {figures['gathers']:,} gathers, "
            f"{figures['scatters']:,} scatters, {late:.0%} of gathered bytes when needed"
        )
    ratio = seconds[OLD] / seconds[NEW]
    print(f"  host, before / after: {ratio:.2f} ×; the host waits once a layer and pass, for counts of experts")
    bench.bar("host seconds, 61 layers", seconds[NEW] * 61 / layers, HOST_BAR)
    bench.bar("gathered only when needed", found[NEW]["of it not prefetched"], 0.0)
    bench.bar("host seconds, 61 layers, experts spread over 8 ranks", seconds[SPREAD] * 61 / layers, SPREAD_BAR)
    bench.bar("gathered only when needed, experts spread", found[SPREAD]["of it not prefetched"], 0.0)


def products() -> None:
    """Forward and backward of one shard, by tokens per expert: the measurements behind ``auto``."""
    import torch

    from deepseek_sft.model.expert_products import ExpertProducts, choose, counts_of_shards

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    experts, hidden, ffn = (8, 7168, 2048) if device.type == "cuda" else (8, 1024, 256)

    def milliseconds(rows, w1w3, w2, tokens: int, grouped: bool) -> float:
        (counts,) = counts_of_shards(torch.full((experts,), tokens, device=device), experts, grouped)
        best = float("inf")
        for _ in range(5):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            output = ExpertProducts.apply(rows, w1w3, w2, counts)
            output.backward(torch.ones_like(output))
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        return best * 1e3

    print(f"{device}, {experts} experts, hidden {hidden}, ffn {ffn}: milliseconds of loop and grouped products")
    for dtype in (torch.bfloat16, torch.float32):
        print(f" {dtype}: auto takes {'grouped' if choose('auto', device, dtype, hidden, ffn) else 'loop'}")
        w1w3 = torch.randn(experts, 2 * ffn, hidden, device=device, dtype=dtype, requires_grad=True)
        w2 = torch.randn(experts, hidden, ffn, device=device, dtype=dtype, requires_grad=True)
        for tokens in (4, 16, 64, 256, 1024):
            rows = torch.randn(experts * tokens, hidden, device=device, dtype=dtype, requires_grad=True)
            times = [milliseconds(rows, w1w3, w2, tokens, grouped) for grouped in (False, True)]
            print(f"  {tokens:5d} tokens per expert: {times[0]:8.2f} {times[1]:8.2f}")


PARTS = {
    "count": count,
    "memory": memory,
    "speed": speed,
    "padding": padding,
    "scale": scale,
    "exchange": exchange,
    "skew": skew,
    "demo_experts": demo_experts,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--layers", type=int, default=61, help="of the faked ranks of scale [61]")
    parser.add_argument("--steps", type=int, default=60, help="of each size that demo_experts measures [60]")
    parser.add_argument("--products", action="store_true", help="measure expert products (in the train environment)")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}")
    if options.products:
        products()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        bench.layers, bench.steps = options.layers, options.steps
        for part in options.parts or PARTS:
            PARTS[part](bench)
    print(f"{bench.missed} bars missed" if bench.missed else "all bars met")
    return min(bench.missed, 1)


if __name__ == "__main__":
    sys.exit(main())
