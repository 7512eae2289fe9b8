"""Check the nodes of a job before training starts on them; started once per node, inside the allocation.

    srun --ntasks-per-node=1 python workflow/scripts/preflight.py --settings preflight.json \\
        --results results/EXPERIMENT --receipt results/EXPERIMENT/receipts/preflight.json \\
        --plan-receipt … --base-receipt … --tokens-receipt …

Each node checks its memory, /dev/shm, limits, disks, GPUs, InfiniBand ports, code, packages and files; that the
rendezvous port of training is free and reachable from every node; that the results folder is one and the same. Then all
nodes multiply matrices, copy memory, and sum inside each node and over the network together. The first node writes the
table <results>/preflight/table.txt and the receipt.

Exit codes (first node): 0 all nodes are fit, 2 bad input, 3 a node is not (each named, with the --exclude to use),
5 crash.
"""

import os
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files, receipts
from deepseek_sft.preflight import settings as preflight_settings
from deepseek_sft.preflight import stage
from deepseek_sft.preflight.node_report import Place
from deepseek_sft.slurm import nodes
from deepseek_sft.training import slow_nodes

RULES = ("preflight", "train_preflight", "rehearse_preflight")


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of preflight settings")
    parser.add_argument("--results", type=Path, required=True, help="results/<experiment>, on the shared storage")
    parser.add_argument("--plan-receipt", type=Path, help="receipt of plan or refine_plan: its needs are thresholds")
    parser.add_argument("--base-receipt", type=Path, help="receipt of prepare_model: its folder must look alike")
    parser.add_argument("--tokens-receipt", type=Path, help="receipt of tokenize_data: likewise")
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda", help="what to train on")
    parser.add_argument("--ranks-per-node", type=int, help="processes per node; default: one per GPU")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write")
    parser.add_argument("--rule", choices=RULES, default="preflight", help="whose it is")
    parser.add_argument("--output", type=Path, help="folder of what is found; default: <results>/preflight")
    parser.add_argument(
        "--train-nodes", type=int, help="nodes to train on, fewer than the job has: the others are spare"
    )
    parser.add_argument("--chosen", type=Path, help="file for the names of the nodes to train on, one a line")
    options = parser.parse_args()
    if (options.train_nodes is None) != (options.chosen is None):
        parser.error("--train-nodes and --chosen belong together")

    files.require_writable(options.results / "receipts", options.receipt)
    chosen = preflight_settings.read(options.settings)
    needs = preflight_settings.needs_of(options.plan_receipt)
    node = nodes.detect(options.accelerator, options.ranks_per_node)
    hosts = [nodes.own_name()]
    if node.nodes > 1:
        hosts = list(node.hosts)
    folders, inputs = {}, {}
    for name, rule, path in (
        ("base", "prepare_model", options.base_receipt),
        ("tokens", "tokenize_data", options.tokens_receipt),
    ):
        if path is not None:
            folders[name] = Path(receipts.read(path, rule, {"result": {name: str}})["result"][name])
            inputs[name] = receipts.input_entry(path)
    if options.plan_receipt is not None:
        inputs["plan"] = receipts.input_entry(options.plan_receipt)
    options.results.mkdir(parents=True, exist_ok=True)
    place = Place(
        node=node,
        hosts=hosts,
        accelerator=options.accelerator,
        results=options.results,
        output=options.output or options.results / "preflight",
        folders=folders,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        wanted=options.train_nodes,
        avoided=slow_nodes.read(options.results / "train"),
    )
    outcome = stage.run(place, chosen, needs)
    if outcome is None:
        return
    stage.gate(place, outcome)
    receipts.write(
        options.receipt,
        options.rule,
        inputs=inputs,
        settings=vars(chosen) | {"skip": list(chosen.skip)},
        result={"table": str(place.output / "table.txt"), "nodes": str(place.output / "nodes.json")},
        figures=stage.figures(outcome, chosen, len(hosts)),
        hosts=hosts,
    )
    if outcome.chosen:
        files.write_text(options.chosen, "".join(f"{host}\n" for host in outcome.chosen))
        cli.say(f"{len(outcome.chosen)} of {len(hosts)} nodes train; receipt {options.receipt}")
    else:
        cli.say(f"all {len(hosts)} nodes are fit; receipt {options.receipt}")


if __name__ == "__main__":
    cli.run(main)
