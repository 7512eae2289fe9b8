"""Promises of training's numbers: the same however a step is spread, and those of a plain loop over transformers."""

import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from training_inputs import probe_variables

from deepseek_sft.convert import tiny_model
from deepseek_sft.data import tokens
from deepseek_sft.planning.counting import count
from deepseek_sft.planning.expert_exchange import Exchange
from deepseek_sft.planning.settings import Cluster, Training

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent
VOCABULARY, STEPS = 1024, 20
SHAPE = tiny_model.TinyShape(vocab_size=VOCABULARY, kv_lora_rank=64, heads=8)
GLOBAL_BATCH = 16

# World size, sequence-parallel size, accumulation: all give the same 16 rows a step.
SPREADS = [(world, size, steps) for world in (1, 2, 4) for size in (1, 2, 4) if size <= world for steps in (1, 4)]
SPREADS += [(8, 8, 1)]
LONG = {(1, 1, 4), (2, 2, 4), (4, 1, 1), (4, 4, 1)}  # these train 20 steps
BF16 = {"dtype": "bfloat16", "micro_batch_size": 2, "learning_rate": 5e-4}
MIXED = {
    "zero3": {
        "strategy": "zero3",
        "deepspeed": {"steps_per_print": 1000, "zero_optimization": {"sub_group_size": 200_000}},
    },
    "offload-both": {"strategy": "zero3_offload"},
    "offload-optimizer": {"strategy": "zero3_offload", "offload": "optimizer", "sequence_parallel_size": 2},
    "offload-parameters": {"strategy": "zero3_offload", "offload": "parameters"},
    "experts-on-two-ranks": {"strategy": "zero3_offload", "expert_parallel_size": 2},
}
COMPILED = {  # DeepSpeed's optimizer is compiled by each start
    "cpu-adam-both": {"strategy": "zero3_offload", "optimizer": "cpu_adam"},
    "cpu-adam-optimizer": {"strategy": "zero3_offload", "offload": "optimizer", "optimizer": "cpu_adam"},
}
# Experts spread over ranks, world size → name → settings: of one node, or of several, reached in two stages.
EXACT = {"max_grad_norm": 1e6}
EXPERTS: dict[int, dict[str, dict]] = {
    2: {
        "experts-2": {"expert_parallel_size": 2, "micro_batch_size": 8},
        "experts-2-chunks": {
            "expert_parallel_size": 2,
            "exchange_rows": 37,
            "sequence_parallel_size": 2,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 4,
        },
    },
    4: {
        "experts-4": {"expert_parallel_size": 4, "experts_per_shard": 2, "micro_batch_size": 4},
        "experts-2-of-4": {
            "expert_parallel_size": 2,
            "experts_per_shard": 2,
            "strategy": "zero3_offload",
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 4,
        },
        "experts-4-two-nodes": {
            "expert_parallel_size": 4,
            "experts_per_shard": 2,
            "nodes": 2,
            "micro_batch_size": 4,
            "exchange_rows": 23,
        },
    },
    8: {
        "experts-8-four-nodes": {
            "expert_parallel_size": 8,
            "experts_per_shard": 1,
            "nodes": 4,
            "recompute": "without_experts",
            "micro_batch_size": 4,
            "sequence_parallel_size": 2,
        },
    },
}
# What comes into four nodes of two ranks, DeepSpeed keeping nothing gathered: experts over all of them, over two each.
INTO_NODES = {
    "into-nodes-8": {"expert_parallel_size": 8, "experts_per_shard": 1},
    "into-nodes-4": {"expert_parallel_size": 4, "experts_per_shard": 2, "recompute": "without_experts"},
}
NOTHING_KEPT = {
    **{f"stage3_max_{what}": 0 for what in ("live_parameters", "reuse_distance")},
    **dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), 0),
}
FROZEN = {"freeze": ["router"], "expert_parallel_size": 2, "micro_batch_size": 8}
EXPERT_NAMES = [name for cases_of in EXPERTS.values() for name in cases_of]
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None
COMPILES = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler (Debian: g++)")
BROKEN = ("zero3", "zero3_offload")
BALANCE = {"balance_bias_speed": 0.01, "max_grad_norm": 1e6}
HELD_OUT = 29  # rows, which no micro batch of the spreads divides


def spread_name(spread: tuple[int, int, int]) -> str:
    return "world{}-sequence{}-accumulation{}".format(*spread)


def cases(world_size: int) -> dict:
    """What one launch of ``world_size`` ranks computes."""
    found = {}
    for spread in SPREADS:
        world, sequence, accumulation = spread
        if world == world_size:
            settings = {
                "sequence_parallel_size": sequence,
                "gradient_accumulation_steps": accumulation,
                "micro_batch_size": GLOBAL_BATCH * sequence // world // accumulation,
                "max_grad_norm": 1e6,
            }
            steps = STEPS if spread in LONG else 1
            found[spread_name(spread)] = {"settings": settings, "steps": steps, "moments": True}
    for name, settings in EXPERTS.get(world_size, {}).items():
        steps = STEPS if name == "experts-2" else 1
        found[name] = {"settings": EXACT | settings, "steps": steps, "moments": True, "visits": "nodes" in settings}
        found[name]["order"] = True
    if world_size == 8:
        for name, settings in INTO_NODES.items():
            case = {"settings": EXACT | settings | {"nodes": 4, "micro_batch_size": 4}, "zero": NOTHING_KEPT}
            found[name] = case | {"steps": 1, "into_nodes": True}
    if world_size == 2:
        for name, settings in (MIXED | COMPILED if HAS_COMPILER else MIXED).items():
            micro = 4 if settings.get("sequence_parallel_size") == 2 else 2
            found[name] = {"settings": BF16 | settings | {"micro_batch_size": micro}, "steps": 50}
        gathered = {"keep_layer_gathered": True, "micro_batch_size": 8, "max_grad_norm": 1e6}
        for strategy in BROKEN:
            settings = BF16 | {"strategy": strategy, "gradient_accumulation_steps": 2, "micro_batch_size": 1}
            found[f"broken-{strategy}"] = {"settings": settings, "steps": 2, "broken": True}
        found["frozen"] = {"settings": EXACT | FROZEN, "steps": 3, "moments": True}
        found["kept-gathered"] = {"settings": gathered, "steps": 1, "moments": True}
        kept = {"recompute": "without_attention", "sequence_parallel_size": 2, "micro_batch_size": 16}
        found["kept-attention"] = {"settings": kept | {"max_grad_norm": 1e6}, "steps": 1, "moments": True}
        experts = BALANCE | {"micro_batch_size": 2, "expert_parallel_size": 2}
        sequence = BALANCE | {"micro_batch_size": 4, "sequence_parallel_size": 2}
        for name, settings in {"balance-experts": experts, "balance": sequence}.items():
            case = {"settings": settings, "steps": 3, "counted": True}
            found |= {name: case, f"{name}-validated": case | {"validated": True}}
    if world_size == 1:
        accumulated = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "activation_checkpointing": False}
        found["balance-alone"] = {"settings": BALANCE | accumulated, "steps": 3}
    return found


def make_inputs(folder: Path, packed: bool = True) -> None:
    """A base, and rows of very uneven masks: packed rows, a row with one trained token, a row without any; likewise
    rows that are held out.

    Args:
        packed: whether every third row holds several samples; else all hold one.
    """
    tiny_model.write_tiny(folder / "base", SHAPE, 0, 8_000_000)
    write_rows(folder / "tokens", 2 * GLOBAL_BATCH, np.random.default_rng(0), packed)
    write_rows(folder / "held_out", HELD_OUT, np.random.default_rng(1), packed)


def write_rows(folder: Path, rows: int, random: np.random.Generator, packed: bool) -> None:
    folder.mkdir()
    writer = tokens.TokenWriter(folder)
    lengths = []
    for number in range(rows):
        sizes = random.integers(3, 24, 3) if packed and number % 3 == 0 else random.integers(6, 40, 1)
        ids = random.integers(2, 60, sizes.sum()).astype(np.int32)
        trained = random.random(len(ids)) < random.choice([0.05, 0.5, 1.0])
        if number < 2:
            trained = np.arange(len(ids)) == (len(ids) - 1 if number else -1)
        writer.add(f"row-{number}", ids, np.where(trained, ids, -100).astype(np.int32), sizes.astype(np.int32))
        lengths.append(len(ids))
    shards = writer.close()
    statistics = {"rows": len(lengths), "samples": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    tokens.write_index(folder, {"shards": shards, "vocab_size": VOCABULARY} | statistics)


@pytest.fixture(scope="module")
def figures(environment, project, tmp_path_factory):
    """Case → figures, and ``reference``: all launches."""
    folder = tmp_path_factory.mktemp("numbers")
    make_inputs(folder)
    python = environment("train")
    variables = probe_variables(project, python) | {"TORCH_EXTENSIONS_DIR": str(folder / "compiled")}

    (folder / "cases.json").write_text(json.dumps({size: cases(size) for size in (1, 2, 4, 8)}))
    probe = [str(STAGES / "training_spread_probe.py"), str(folder), str(folder / "cases.json"), str(folder)]
    result = subprocess.run(
        [str(python), *probe], env=variables, cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("spread", SPREADS, ids=spread_name)
def test_the_first_loss_is_that_of_each_sample_alone_however_a_step_is_spread(figures, spread):
    wanted = figures["reference-float32"]["losses"][0]
    assert figures[spread_name(spread)]["losses"][0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("spread", SPREADS, ids=spread_name)
def test_every_gradient_is_that_of_each_sample_alone_however_a_step_is_spread(figures, spread):
    moments = figures[spread_name(spread)]["moments"]
    assert max(moments.values()) < 1e-5, max(moments.items(), key=lambda item: item[1])


@pytest.mark.parametrize("spread", sorted(LONG), ids=spread_name)
def test_twenty_steps_agree_with_a_plain_loop_to_four_digits(figures, spread):
    assert figures[spread_name(spread)]["losses"] == pytest.approx(figures["reference-float32"]["losses"], rel=5e-5)


@pytest.mark.parametrize("way", [*sorted(MIXED), *(pytest.param(way, marks=COMPILES) for way in sorted(COMPILED))])
def test_bf16_with_fp32_masters_follows_a_plain_loop_for_fifty_steps(figures, way):
    wanted, found = np.array(figures["reference-bfloat16"]["losses"]), np.array(figures[way]["losses"])
    assert len(found) == 50
    assert found[0] == pytest.approx(wanted[0], rel=3e-3)
    assert np.abs(found / wanted - 1).max() < 0.01
    assert found[-10:].mean() == pytest.approx(wanted[-10:].mean(), rel=5e-3)
    assert found[-10:].mean() < found[0] - 1


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_experts_spread_over_ranks_give_the_loss_and_every_gradient_of_a_plain_loop(figures, name):
    wanted, found = figures["reference-float32"]["losses"], figures[name]
    assert found["losses"] == pytest.approx(wanted[: len(found["losses"])], rel=5e-5)
    assert found["losses"][0] == pytest.approx(wanted[0], rel=1e-5)
    assert max(found["moments"].values()) < 1e-5, max(found["moments"].items(), key=lambda item: item[1])


def test_frozen_routers_keep_every_bit_and_all_others_their_gradients(figures):
    found = figures["frozen"]
    assert found["losses"][0] == pytest.approx(figures["reference-float32"]["losses"][0], rel=1e-5)
    routers = {name: worst for name, worst in found["moments"].items() if name.endswith("mlp.gate.weight")}
    assert set(routers.values()) == {1.0}, "their moments are zero"
    assert max(worst for name, worst in found["moments"].items() if name not in routers) < 1e-5
    assert found["router_kept"] and not figures["experts-2"]["router_kept"]


@pytest.mark.parametrize("name", ["experts-4-two-nodes", "experts-8-four-nodes"])
def test_a_token_travels_once_to_each_other_node_that_holds_experts_of_it(figures, name):
    found, needed = figures[name]["visits"]
    assert found == needed > 0


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_the_shared_experts_backward_pass_runs_while_rows_and_gradients_travel(figures, name):
    seen = "".join({"sends": "s", "mlp": "m", "computes": "c"}[what] for what in figures[name]["order"])
    # Of each of two layers with experts one shard's first chunk so, its others in a row; then comes the dense layer.
    assert re.fullmatch("((sc)*smc(sc)*smc(sc)*m)+", seen), seen


@pytest.mark.parametrize("name", INTO_NODES)
def test_what_comes_into_a_node_is_what_the_plan_says(figures, name):
    found, (rows, weights) = (
        figures[name]["into_nodes"],
        planned_into_nodes(name, figures[name]["into_nodes"]["tokens"]),
    )
    counted = found["bytes"]
    assert (counted["rows"] + counted["routes"]) / 4 == pytest.approx(rows, rel=0.1)
    assert sum(counted.values()) / 4 == pytest.approx(rows + weights, rel=0.1)


def planned_into_nodes(name: str, tokens: float) -> tuple[float, float]:
    """Bytes of rows, and of weights and gradients in fp32, that the plan brings into a node in a micro batch."""
    settings = {"strategy": "zero3", "sequence_parallel_size": 1, "micro_batch_size": 4, "epochs": 1, "max_steps": None}
    settings |= {"gradient_accumulation_steps": 1, "dtype": "float32", "activation_checkpointing": True}
    settings |= {"save_every_steps": 1, "keep_checkpoints": 1} | INTO_NODES[name]
    unknown = dict.fromkeys(("gpu_bytes", "host_bytes", "storage_bytes", "gpu_tflops", "node_gb_per_second"))
    unknown |= dict.fromkeys(("memory_gb_per_second", "storage_gb_per_second", "failures_per_1000_node_days"), 1.0)
    plan = Exchange(count(tiny_model.config_of(SHAPE)), Training(**settings), Cluster(4, 2, **unknown))
    four = 4 * (3 + 1)  # bytes of three gathers and of a scatter
    return plan.rows_into_node(tokens), four * (plan.experts_into_node() + plan.others_into_node())


def test_keys_for_deepspeed_reach_its_engine(figures):
    assert figures["zero3"]["deepspeed"] == [1000, 200_000]
    assert figures["offload-both"]["deepspeed"][0] > 10**9, "else it says nothing of its progress"


def test_gradients_are_the_same_when_layers_are_kept_gathered(figures):
    assert figures["kept-gathered"]["losses"] == figures[spread_name((2, 1, 1))]["losses"][:1]
    assert figures["kept-gathered"]["moments"] == figures[spread_name((2, 1, 1))]["moments"]


def test_gradients_are_the_same_when_attention_is_not_computed_again(figures):
    assert figures["kept-attention"]["losses"] == figures[spread_name((2, 2, 1))]["losses"][:1]
    assert figures["kept-attention"]["moments"] == figures[spread_name((2, 2, 1))]["moments"]


def test_balance_biases_move_by_the_whole_batch_and_stay_equal_on_all_ranks(figures):
    shared, alone, spread = (figures[name] for name in ("balance", "balance-alone", "balance-experts"))
    assert spread["biases_equal"]
    assert spread["biases"] == alone["biases"]
    assert shared["biases_equal"]
    assert shared["biases"] == alone["biases"]
    assert shared["biases"][0] == figures["reference-float32"]["biases"]
    assert shared["biases"][0] != shared["biases"][2]


@pytest.mark.parametrize("name", [*map(spread_name, SPREADS), *EXPERT_NAMES])
def test_the_validation_loss_is_that_of_each_held_out_sample_alone_however_it_is_spread(figures, name):
    assert figures[name]["validation"] == pytest.approx(figures["reference-float32"]["validation"], rel=1e-5)


@pytest.mark.parametrize("name", ["balance", "balance-experts"])
def test_training_is_the_same_to_the_bit_with_and_without_validation(figures, name):
    without, validated = figures[name], figures[f"{name}-validated"]
    for key in ("losses", "biases", "counts", "weights"):
        assert validated[key] == without[key], key
    assert validated["biases_equal"]


@pytest.mark.parametrize("name", ["balance", "balance-experts"])
def test_validation_leaves_random_numbers_counts_clocks_and_the_order_of_modules_alone(figures, name):
    assert figures[f"{name}-validated"]["untouched"]


@pytest.mark.parametrize("strategy", BROKEN)
def test_a_gradient_that_is_no_number_under_a_finite_loss_changes_no_weight(figures, strategy):
    found = figures[f"broken-{strategy}"]
    assert all(map(math.isfinite, found["losses"]))
    assert found["verdicts"] == ["not_finite", "fine"]
    assert found["unchanged"]


def test_each_rank_reads_its_share_of_the_base(figures):
    alone = figures[spread_name((1, 1, 1))]["bytes_read"][0]
    read = figures[spread_name((4, 1, 1))]["bytes_read"]
    assert max(read) < 1.05 * alone / 4
