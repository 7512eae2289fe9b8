"""Run by the train environment's Python: the same steps, spread over ranks in different ways, beside a plain loop.

Usage: training_spread_probe.py INPUTS CASES OUTPUT, with ``tests`` in PYTHONPATH
CASES is JSON: world size → name → {"settings": {…}, "steps": N, "moments": bool, "broken": bool, "visits": bool}.
Writes OUTPUT/<name>.json for each, and the references (``training_reference.py``). ``broken``: in the first step one
parameter's gradient is not a number. ``visits``: rows that arrived from other nodes in the newest layer's exchange, of
all ranks, and how many the tokens' experts ask for.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
import training_ranks
import training_reference


def run_cases(inputs: Path, cases: dict, output: Path) -> None:
    """On each rank of a group: all cases of its world size, one after another."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param
    from training_engine import engine

    from deepseek_sft.model import node_exchange

    newest: list = []  # exchange of the last layer that ran
    make = node_exchange.TokenExchange.__init__

    def remembered(self, *arguments) -> None:
        make(self, *arguments)
        newest[:] = [self]

    node_exchange.TokenExchange.__init__ = remembered
    for name, case in cases.items():
        begin = time.monotonic()
        with engine(inputs / "base", inputs / "tokens", **case["settings"]) as run:
            figures: dict = {"losses": [], "biases": [], "verdicts": []}
            broken = run.model.llm.routers()[0].weight
            hook = broken.register_hook(lambda gradient: gradient * float("nan")) if case.get("broken") else None
            before = safe_get_full_fp32_param(broken).clone()
            for step in range(case["steps"]):
                figures["losses"].append(run.step())
                figures["verdicts"].append(run.result.verdict.kind)
                if hook is not None:
                    figures["unchanged"] = torch.equal(before, safe_get_full_fp32_param(broken))
                    hook = hook.remove()
                if step == 0 and case.get("moments"):
                    figures["moments"] = differences(run, output / "reference.pt")
                if run.model.balance_bias is not None:
                    biases = [router.e_score_correction_bias.tolist() for router in run.model.llm.routers()]
                    figures["biases"].append(biases)
            figures["router_kept"] = torch.equal(before, safe_get_full_fp32_param(broken))
            if case.get("visits"):
                figures["visits"] = visits(newest[0])
            figures["deepspeed"] = [run.engine.steps_per_print(), run.engine.zero_sub_group_size()]
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (run.model.llm.bytes_read, figures["biases"]))
        figures["bytes_read"] = [entry[0] for entry in everyone]
        figures["biases_equal"] = all(entry[1] == everyone[0][1] for entry in everyone)
        figures["seconds"] = round(time.monotonic() - begin, 2)
        if dist.get_rank() == 0:
            (output / f"{name}.json").write_text(json.dumps(figures))


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
