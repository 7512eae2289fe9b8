"""Run by the train environment's Python: the same steps, spread over ranks in different ways, beside a plain loop.

Usage: training_spread_probe.py INPUTS CASES OUTPUT, with ``tests`` in PYTHONPATH
CASES is JSON: world size → name → {"settings": {…}, "steps": N, "moments": bool, "broken": bool, "visits": bool,
"counted": bool, "validated": bool, "zero": {…}, "into_nodes": bool, "order": bool}.
Writes OUTPUT/<name>.json for each, and the references (``training_reference.py``). ``broken``: in the first step one
parameter's gradient is not a number. ``visits``: rows that arrived from other nodes in the newest layer's exchange, of
all ranks, and how many the tokens' experts ask for. ``counted``: tokens of each expert, and checksums of each rank's
weights and moments, after the last step. ``into_nodes``: what comes into the nodes in the last step, its experts drawn
evenly, and the tokens of a rank in it. ``order``: what the first step's backward passes of expert layers did, one after
another. ``zero``: changes to DeepSpeed's ``zero_optimization``. ``validated``: the held-out rows are measured
before and after each step. With ``moments`` they are measured before the first.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import training_ranks
import training_reference

SAMPLES = 1000  # of the held-out rows: all


def run_cases(inputs: Path, cases: dict, output: Path) -> None:
    """On each rank of a group: all cases of its world size, one after another."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param
    from training_engine import engine

    from deepseek_sft.model import node_exchange
    from deepseek_sft.training.xtuner_engine import compute_clock

    newest: list = []  # exchange of the last layer that ran
    make = node_exchange.TokenExchange.__init__

    def remembered(self, *arguments) -> None:
        make(self, *arguments)
        newest[:] = [self]

    node_exchange.TokenExchange.__init__ = remembered
    for name, case in cases.items():
        begin = time.monotonic()
        with engine(inputs / "base", inputs / "tokens", case.get("zero"), **case["settings"]) as run:
            figures: dict = {"losses": [], "biases": [], "verdicts": []}
            run.counts = run.model.count_experts()
            run.clock = compute_clock.ComputeClock(run.model.llm.model.layers, run.engine.device)
            broken = run.model.llm.routers()[0].weight
            hook = broken.register_hook(lambda gradient: gradient * float("nan")) if case.get("broken") else None
            before = safe_get_full_fp32_param(broken).clone()
            measure = validation_of(run, inputs)
            if case.get("moments"):
                figures["validation"] = measure()
            if case.get("validated"):
                figures["untouched"] = unrecorded(run) and math.isfinite(measure()) and unrecorded(run)
            for step in range(case["steps"]):
                if case.get("into_nodes") and step + 1 == case["steps"]:
                    figures["into_nodes"] = into_nodes(run)
                    break
                with in_order(figures) if case.get("order") and step == 0 else contextlib.nullcontext():
                    figures["losses"].append(run.step())
                figures["verdicts"].append(run.result.verdict.kind)
                if hook is not None:
                    figures["unchanged"] = torch.equal(before, safe_get_full_fp32_param(broken))
                    hook = hook.remove()
                if case.get("validated"):
                    figures["untouched"] = untouched(run, measure) and figures.get("untouched", True)
                if step == 0 and case.get("moments"):
                    figures["moments"] = differences(run, output / "reference.pt")
                if run.model.balance_bias is not None:
                    biases = [router.e_score_correction_bias.tolist() for router in run.model.llm.routers()]
                    figures["biases"].append(biases)
            figures["router_kept"] = torch.equal(before, safe_get_full_fp32_param(broken))
            if case.get("visits"):
                figures["visits"] = visits(newest[0])
            if case.get("counted"):
                figures["counts"] = run.counts.take().tolist()
                figures["weights"] = digest(run)
            figures["deepspeed"] = [run.engine.steps_per_print(), run.engine.zero_sub_group_size()]
            everyone = [None] * dist.get_world_size()
            seen = (run.model.llm.bytes_read, figures["biases"], figures.get("weights"), figures.get("untouched", True))
            dist.all_gather_object(everyone, seen)
        figures["bytes_read"] = [entry[0] for entry in everyone]
        figures["biases_equal"] = all(entry[1] == everyone[0][1] for entry in everyone)
        figures["weights"] = [entry[2] for entry in everyone]
        figures["untouched"] = all(entry[3] for entry in everyone)
        figures["seconds"] = round(time.monotonic() - begin, 2)
        if dist.get_rank() == 0:
            (output / f"{name}.json").write_text(json.dumps(figures))


def validation_of(run, inputs: Path):
    """What measures the held-out rows in an engine."""
    from deepseek_sft.training.xtuner_engine.validation_loss import Validation

    changed = dataclasses.replace(run.settings, validation={"every_steps": 1, "samples": SAMPLES})
    validation = Validation(inputs / "held_out", changed, 1, {})
    return lambda: validation.measure(run.engine, 1).loss


def untouched(run, measure) -> bool:
    """Whether a measurement leaves random numbers, DeepSpeed's order of modules, counts and clocks as they were."""
    run.clock.take()
    before, loss, after = kept(run), measure(), kept(run)
    return math.isfinite(loss) and before == after


def unrecorded(run) -> bool:
    """Whether DeepSpeed has recorded no order of modules yet, as at a start."""
    return run.engine.optimizer.parameter_offload.get_param_coordinator().is_invalid_trace()


def kept(run) -> list:
    """What training goes on from, beside weights and moments."""
    coordinator = run.engine.optimizer.parameter_offload.get_param_coordinator()
    coordinator.reset_step()  # as the next step begins
    order = coordinator._PartitionedParameterCoordinator__param_order
    routers = run.model.llm.routers()
    return [
        torch.get_rng_state().tolist(),
        coordinator.is_complete_trace(),
        [(entry.param.ds_id, entry.step_id_last_used_at) for entry in order],
        [str(parameter.ds_status) for parameter in run.model.parameters()],
        [router.e_score_correction_bias.tolist() for router in routers],
        run.model.training,
        run.counts.counts.tolist(),
        run.clock.take(),
    ]


def digest(run) -> list[int]:
    """Checksums of this rank's master weights and moments."""
    from deepseek_sft.training.xtuner_engine import engine_states

    zero = run.engine.optimizer
    found = []
    for flat, _ in engine_states.owners(zero):
        state = zero.optimizer.state[flat]
        found += [flat, *(torch.as_tensor(state[name]) for name in sorted(state))]
    return [zlib.crc32(tensor.detach().float().cpu().numpy().tobytes()) for tensor in found]


@contextlib.contextmanager
def in_order(figures: dict):
    """Note when a backward pass begins to send, when it reaches the shared experts, when the routed are computed."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

    from deepseek_sft.model import expert_parallel, node_exchange

    noted: list[str] = []
    figures["order"] = noted

    def first_noting(what, function):
        return lambda *arguments: (noted.append(what), function(*arguments))[1]

    def with_hook(self, hidden, forward=DeepseekV3MLP.forward):
        output = forward(self, hidden)
        if output.requires_grad:
            output.register_hook(lambda _: noted.append("mlp"))
        return output

    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch.object(DeepseekV3MLP, "forward", with_hook))
        for module, kind in ((expert_parallel, "Exchange"), (node_exchange, "TokenExchange")):
            exchange, computed = getattr(module, kind), first_noting("computes", module.products_backward)
            sending = first_noting("sends", exchange.start_back)
            changed.enter_context(mock.patch.object(exchange, "start_back", sending))
            changed.enter_context(mock.patch.object(module, "products_backward", computed))
        yield


def into_nodes(run) -> dict:
    """Bytes that come into all nodes in a step whose tokens choose their experts evenly, by kind; its tokens a rank."""
    import torch.distributed as dist
    from node_bytes import IntoNode

    from deepseek_sft.model.router import Router

    torch.manual_seed(dist.get_rank())
    (batch,) = run.batches(run.steps_done)
    choose, counter = Router.choose, IntoNode(dist.get_world_size() // run.told.nodes, run.model.llm.config.hidden_size)
    Router.choose = lambda self, scores: choose(self, torch.rand_like(scores))
    with counter:
        run.step()
    Router.choose = choose
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (dict(counter.bytes), batch.input_ids.numel()))
    kinds = {kind for found, _ in everyone for kind in found}
    found = {kind: sum(entry.get(kind, 0.0) for entry, _ in everyone) for kind in kinds}
    return {"bytes": found, "tokens": sum(tokens for _, tokens in everyone) / len(everyone)}


def visits(exchange) -> list[int]:
    """Rows from other nodes, counted by the exchange and from the chosen experts alone; of all ranks."""
    import torch.distributed as dist

    of_node = exchange.held * exchange.nodes.ranks
    needed = sum(len({e // of_node for e in chosen} - {exchange.nodes.node}) for chosen in exchange.experts.tolist())
    both = torch.tensor([exchange.from_other_nodes, needed])
    dist.all_reduce(both)
    return both.tolist()


def differences(run, reference: Path) -> dict[str, float]:
    """Relative difference of each parameter's first moment from (1 - beta1) × the reference's gradient.

    Each expert by itself, so that shards of any size compare, of whatever rank holds it.
    """
    import torch.distributed as dist

    wanted = of_each_expert(torch.load(reference), training_reference.SHARD)
    own = {
        name: ((moment / 0.1 - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)).item()
        for name, moment in of_each_expert(run.first_moments(), run.settings.experts_per_shard).items()
    }
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    found: dict[str, float] = {}
    for entry in everyone:
        found |= {name: max(value, found.get(name, 0.0)) for name, value in entry.items()}
    assert found.keys() == wanted.keys()
    return found


def of_each_expert(gradients: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Flat gradients, shards of ``count`` experts cut into shards of one."""
    found = {}
    for name, values in gradients.items():
        head, separator, rest = name.partition(".mlp.experts.")
        if not separator:
            found[name] = values.flatten()
            continue
        shard, kind = rest.split(".")
        for place, part in enumerate(values.flatten().chunk(count)):
            found[f"{head}{separator}{int(shard) * count + place}.{kind}"] = part
    return found


def main(inputs: Path, cases: dict, output: Path) -> None:
    training_ranks.import_libraries()
    training_ranks.together([partial(loop, inputs, output) for loop in training_reference.LOOPS])
    for size, chosen in cases.items():
        training_ranks.group(int(size), run_cases, output / f"meeting-{size}", inputs, chosen, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
