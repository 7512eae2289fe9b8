"""A results folder of a small finished experiment, as the stages leave it, for the tests of the report."""

import json
import math
from pathlib import Path
from typing import Any

HOSTILE = "<script>alert('x')</script><img src=http://example.org/x.png>"
STEPS = 120
LAYERS, EXPERTS = 6, 16

FIGURES: dict[str, dict[str, Any]] = {
    "prepare_data": {
        "records": 1003,
        "accepted": 1000,
        "rejected": 3,
        "rejects": {"no assistant turn": 2, "not JSON <b>": 1},
        "turns": 2400,
        "trained_turns": 1100,
        "sources": {
            "chats/good.jsonl": {"records": 1000, "accepted": 1000, "formats": {"openai": 1000}, "rejects": {}},
            "chats/bad.jsonl": {"records": 3, "accepted": 0, "formats": {}, "rejects": {"not JSON <b>": 3}},
        },
        "unused_fields": {"messages[].thought_of <i>": {"records": 500, "first": "chats/good.jsonl:1"}},
        "unclear_fields": {},
    },
    "tokenize_data": {
        "rows": 1000,
        "samples": 1000,
        "tokens": 123456,
        "trained_tokens": 45678,
        "longest": 502,
        "length": {"count": 1000, "mean": 123.46, "median": 110, "p95": 300, "max": 502},
        "rejected": 2,
        "rejects": {"too_long": 2},
    },
    "plan": {
        "verdict": "fits",
        "steps": STEPS,
        "ranks": 4,
        "nodes": 2,
        "checkpoint_bytes": 9395240960,
        "rank_memory_bytes": 1_694_990_855,
        "rank_memory": {
            "parameters, partitioned_bytes": 8_966_768,
            "gradients, partitioned_bytes": 8_966_768,
            "Adam moments_bytes": 235_867_072,
            "live and prefetched parameters_bytes": 35_867_072,
            "gradient bucket and its scatter_bytes": 71_734_144,
            "chunk of logits_bytes": 66_191_360,
            "its gradient_bytes": 49_643_520,
            "process_bytes": 665_719_931,
            "freed memory that glibc keeps_bytes": 687_194_767,
        },
        "host_memory_bytes": 3_712_104_257,
        "host_memory": {"ranks_bytes": 3_389_981_710, "node_bytes": 322_122_547},
        "limits": {"host memory per node": {"need_bytes": 3_712_104_257, "have_bytes": 4_437_184_000}},
    },
    "prepare_model": {
        "parameters": 8_400_000,
        "bytes": 16_800_000,
        "dtype": "BF16",
        "layers": 3,
        "experts": 8,
        "tensors": 97,
    },
    "train": {
        "run_id": "3f9c01d2ab45",
        "steps": STEPS,
        "resumed_from_step": 0,
        "first_loss": 11.79,
        "last_loss": 0.0421,
        "tokens": 400000,
        "trained_tokens": 160000,
        "world_size": 4,
        "nodes": 2,
        "seconds": 90.0,
        "tokens_per_second": 4444.4,
        "parameters": 8_400_000,
        "checkpoint_bytes": 100_800_000,
        "peak_memory_gib": 1.83,
    },
    "convert_checkpoint": {
        "parameters": 8_400_000,
        "tensors": 97,
        "shards": 1,
        "bytes_read": 33_600_000,
        "bytes": 16_800_000,
        "bytes_written": 4_200_000,  # by a retry
        "seconds": 0.7,
        "gib_per_second": 0.045,
        "peak_rss_mib": 210.4,
    },
    "verify_model": {
        "checks": {
            "names": {"passed": True, "detail": "97 of 97"},
            "finite": {"passed": True, "detail": "all tensors"},
        },
        "tensors": 97,
        "largest_relative_change": 0.31,
    },
    "smoke_test": {
        "checks": {
            "health": {"passed": True, "detail": "200 after 14 s"},
            "reasoning": {"passed": True, "detail": "split from the answer"},
        },
        "skipped": {"logprobs": "model too large to compare"},
        "format_rate": 1.0,
        "exact_match_rate": 0.96875,
        "prompts": 32,
        "time_to_ready_s": 14.2,
        "time_to_first_token_s": 0.041,
        "tokens_per_second": 88.0,
        "benchmark": {
            "tool": "vllm bench serve 0.32.0",
            "input_tokens": 128,
            "output_tokens": 64,
            "by_concurrency": {
                str(at): {
                    "requests": max(4, 2 * at),
                    "tokens_per_second": round(34 * at**0.8, 2),
                    "time_to_first_token_s": 0.04 + 0.004 * at,
                    "time_to_first_token_p99_s": 0.06 + 0.009 * at,
                    "time_per_output_token_s": 0.03,
                }
                for at in (1, 4, 16, 64)
            },
        },
        "loss": {"base": 11.84, "tuned": 0.251, "tokens": 1600},
        "example": {"prompt": "What is 17 + 25?", "reasoning": "7 + 5 = 12, carry 1.", "answer": "42"},
    },
}
RESULTS: dict[str, dict[str, str]] = {
    "prepare_data": {"data": "data/train.jsonl"},
    "tokenize_data": {"tokens": "data/tokens", "statistics": "data/statistics.json"},
    "prepare_model": {"model": "base"},
    "train": {"run": "train/runs/3f9c01d2ab45", "metrics": "train/runs/3f9c01d2ab45/metrics.jsonl"},
    "convert_checkpoint": {"model": "model"},
    "smoke_test": {"transcript": "serve/transcript.jsonl", "evaluation": "serve/evaluation.jsonl"},
}


def write_results(root: Path, rules: tuple[str, ...] = tuple(FIGURES)) -> Path:
    """Write ``root/results/demo`` with receipts of ``rules`` and everything they name; returns that folder."""
    results = root / "results" / "demo"
    run = results / "train/runs/3f9c01d2ab45"
    for folder in (
        results / "receipts",
        results / "data/tokens",
        run,
        results / "model",
        results / "base",
        results / "serve",
    ):
        folder.mkdir(parents=True, exist_ok=True)
    (results / "data/train.jsonl").write_text("{}\n")
    bins = [(0, 16, 0), (16, 32, 41), (32, 64, 310), (64, 128, 480), (128, 256, 150), (256, 512, 19)]
    bins = [{"from": low, "below": high, "samples": count} for low, high, count in bins]
    bins[-1]["too_long"] = 7
    statistics = {"length_histogram": bins, "max_length": 400}
    (results / "data/statistics.json").write_text(json.dumps(statistics))
    config = {"experiment": "demo", "train": {"learning_rate": 5e-3}, "serve": {"environment": {"HF_TOKEN": "hunter2"}}}
    (results / "config.yaml").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, STEPS + 1)))
    chats = [
        exchange("chat", "Say hello.", "A greeting.", "Hello!"),
        exchange("held_out_format", "What is 17 + 25?", "7 + 5 = 12, carry 1.\n1 + 2 + 1 = 4.", "42"),
        exchange("held_out_format", f"What is {HOSTILE}?", HOSTILE, HOSTILE),
        exchange("held_out_format", "9.11 和 9.2 哪个大?", "比较小数部分。", "9.2"),
        {"check": "health", "path": "/health", "request": None, "status": 200, "seconds": 0.01, "response": ""},
        exchange("chat", "cut off", "", "") | {"response": "{…"},
    ]
    (results / "serve/transcript.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in chats))
    (run / "expert_load.jsonl").write_text("".join(json.dumps(expert_load(step)) + "\n" for step in (1, 60, STEPS)))
    (results / "serve/evaluation.jsonl").write_text("".join(json.dumps(held_out(n)) + "\n" for n in range(12)))
    for number, rule in enumerate(rules):
        write_receipt(results, rule, finished=f"2026-01-31T12:{number:02d}:30+00:00")
    return results


def held_out(number: int) -> dict[str, Any]:
    """One held-out sample, as the smoke test records it."""
    question = "What is 17 + 25?" if number else f"What is {HOSTILE}?"
    return {
        "id": f"held-out-{number}",
        "question": question,
        "expected": "42",
        "reference": {"reasoning": "7 + 5 = 12, carry 1.", "answer": "42"},
        "reasoning": "7 + 5 = 12, carry 1." if number else HOSTILE,
        "answer": "42",
        "finish_reason": "stop",
        "tokens": 24,
        "well_formed": True,
        "matches": True,
        "loss": 0.2 + 0.1 * math.sin(number) ** 2,
        "base": {"loss": 11.8 + 0.3 * math.cos(number), "reasoning": "", "answer": "的 zoo|| untrained"},
    }


def expert_load(step: int) -> dict[str, Any]:
    """One record of the load of all layers and experts, uneven at first; one expert is dead."""
    uneven = 0.9 / (1 + step / 30)
    load = [[round(1 + uneven * math.sin(7 * layer + 13 * e), 3) for e in range(EXPERTS)] for layer in range(LAYERS)]
    load[1][3] = 0.0
    return {"step": step, "from_step": max(1, step - 59), "first_layer": 3, "load": load}


def exchange(check: str, question: str, reasoning: str, answer: str) -> dict[str, Any]:
    """One line of the smoke test's transcript."""
    message = {"role": "assistant", "content": answer, "reasoning": reasoning}
    return {
        "check": check,
        "path": "/v1/chat/completions",
        "request": {"model": "demo", "messages": [{"role": "user", "content": question}], "temperature": 0},
        "status": 200,
        "seconds": 0.4,
        "response": json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}),
    }


def write_receipt(results: Path, rule: str, **changes: Any) -> None:
    """Write the receipt of one rule, with some of its entries changed."""
    receipt = {
        "schema": 1,
        "rule": rule,
        "started": "2026-01-31T12:00:00+00:00",
        "finished": "2026-01-31T12:00:30+00:00",
        "seconds": 30.2,
        "inputs": {"source": {"path": "resources/demo/chats.jsonl", "fingerprint": f"sha256:{'ab' * 32}"}},
        "settings": {"learning_rate": 2e-7, "api_key": "hunter2", "nested": {"epochs": 1, "sources": ["a", "b"]}},
        "result": {name: f"results/demo/{path}" for name, path in RESULTS.get(rule, {}).items()},
        "figures": FIGURES[rule],
        "hosts": ["node1", "node2"],
        "slurm": {"job_id": "17", "nodes": "node[1-2]", "partition": "main"},
        "versions": {"python": "3.11.7", "workflow": "0.1.0"} | ({"torch": "2.13.0+cpu"} if rule == "train" else {}),
        "command": [f"workflow/scripts/{rule}.py", "--accelerator", "cpu", "--output", "a b", "--api-key", "hunter2"],
    }
    (results / "receipts" / f"{rule}.json").write_text(json.dumps(receipt | changes))


def line(step: int) -> dict[str, Any]:
    """One line of metrics."""
    return {
        "step": step,
        "epoch": step / STEPS,
        "loss": 11.8 * math.exp(-step / 20) + 0.04 + 0.4 * math.sin(step * 2.3) ** 2 * math.exp(-step / 40),
        "learning_rate": 5e-3 * min(step / 6, math.cos(math.pi / 2 * step / STEPS)),
        "grad_norm": 1 + 3 * math.exp(-step / 30) + 0.3 * math.cos(step),
        "tokens": 3000,
        "trained_tokens": 1300,
        "tokens_per_second": 4400 + 150 * math.sin(step),
        "seconds": 0.75,
        "memory_gib": 1.5,
        "expert_load_entropy": [0.99 - 0.002 * layer * math.exp(-step / 40) for layer in range(LAYERS)],
        "dead_experts": [0] * LAYERS,
    }
