"""Say what a run needs before it runs: GPU and host memory, disk, time, cost; and whether the cluster has it.

  plan.py --config config/config.yaml mine.yaml --resources '{"nodes": 32, "gres": "gpu:8", "mem_mb": 1900000}'
  plan.py … --explain                  every number with its formula; docs/planning.md has reasons and sources
  plan.py … --sweep nodes=16,32 sequence_parallel=1,4,8 micro_batch=1,2 strategy=zero3,zero3_offload
  plan.py --model deepseek-r1 --resources …   a public model's shape in place of model.base: nothing is downloaded
  plan.py … --fit                      the fewest nodes for this experiment
  plan.py … --tokens-receipt R         with counted tokens in place of estimates

Of the base model only config.json is read. --resources are those of rule train in the profile; what they do not name is
not judged. Exit code 3 where the plan does not fit, unless the configuration says `plan.on_misfit: warn`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import _bootstrap  # noqa: F401
import yaml

from deepseek_sft import cli, config, files, receipts
from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.planning import alternatives, gate, load, plan_text
from deepseek_sft.planning.remedies import for_the_disk, suffices
from deepseek_sft.planning.settings import COUNTED
from deepseek_sft.planning.training_resources import read_resources
from deepseek_sft.settings import reading
from deepseek_sft.settings.convert import Convert
from deepseek_sft.settings.evaluate import Evaluate
from deepseek_sft.settings.model import Model
from deepseek_sft.settings.plan import Plan
from deepseek_sft.settings.serve import Serve
from deepseek_sft.settings.train import Train
from deepseek_sft.site import questions

DEFAULT = Path(__file__).resolve().parents[2] / "config/config.yaml"


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--config", type=Path, nargs="+", metavar="FILE", help=f"configuration files, merged in order [{DEFAULT.name}]"
    )
    source.add_argument("--settings", help="what the workflow passes: the settings a plan depends on, a JSON object")
    parser.add_argument("--model", choices=load.shapes(), help="a public model's shape in place of model.base")
    parser.add_argument("--partition", help="partition of the nodes, to ask Slurm how much memory they have")
    parser.add_argument("--operational", default="{}", help="settings that only steer the run, a JSON object")
    parser.add_argument("--resources", default="{}", help="resources of rule train, a JSON object")
    parser.add_argument("--tokens-receipt", type=Path, help="receipt of tokenize_data")
    parser.add_argument("--samples", type=int, help="rows, where tokens are not counted yet")
    parser.add_argument("--mean-length", type=float, help="tokens of a row on average")
    parser.add_argument("--longest-row", type=int, help="tokens of the longest row")
    parser.add_argument("--storage-tb", type=float, help="space for results in TB, where it is not what is free here")
    parser.add_argument("--sweep", nargs="+", metavar="KEY=VALUES", help=f"table over {', '.join(alternatives.KEYS)}")
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=False, help="the fewest nodes that fit")
    parser.add_argument("--explain", action=argparse.BooleanOptionalAction, default=False, help="show formulas")
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=False, help="print figures as JSON")
    parser.add_argument("--output", type=Path, help="folder for plan.txt and plan.json")
    parser.add_argument("--receipt", type=Path, help="receipt to write")
    parser.add_argument("--rule", choices=["plan", "refine_plan"], default="plan", help="whose receipt it is")
    chosen = parser.parse_args()
    if chosen.receipt and not chosen.output:
        parser.error("--receipt needs --output")
    return chosen


def read_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration from files, or the parts of it that the workflow passes; then what the command line says."""
    if args.settings is not None:
        found = cli.json_object("--settings", args.settings)
        found = config.merge(found, cli.json_object("--operational", args.operational))
    else:
        merged: dict[str, Any] = {}
        for path in args.config or [DEFAULT]:
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError) as error:
                raise BadInputError(f"configuration {path} cannot be read: {error}") from None
            if not isinstance(content, dict):
                raise BadInputError(f"configuration {path} is not a mapping of keys to values")
            merged = config.merge(merged, content)
        if args.model:
            merged = config.merge(merged, {"model": {"base": str(load.SHAPES / args.model), "tiny": None}})
        found = config.resolve(merged)
    names = ("samples", "mean_length", "longest_row", "storage_tb")
    stated = {name: getattr(args, name) for name in names}
    found["plan"] = found["plan"] | {key: value for key, value in stated.items() if value is not None}
    for section, kind in {"plan": Plan, "model": Model, "train": Train, "convert": Convert}.items():
        reading.parse(kind, found[section], section)
    return found


def main() -> None:
    args = arguments()
    files.require_writable(args.output and args.output / "plan.json", args.receipt)
    settings = read_config(args)
    resources = read_resources(cli.json_object("--resources", args.resources))
    if args.receipt:
        args.receipt.unlink(missing_ok=True)
    inputs = {}
    tokens = None
    if args.tokens_receipt:
        tokens = receipts.read(args.tokens_receipt, "tokenize_data", COUNTED)
        inputs["tokens"] = receipts.input_entry(args.tokens_receipt)
    node_mb = (
        questions.node_memory_mb(args.partition, resources.get("nodes", 1)) if args.partition is not None else None
    )
    serve = reading.parse(Serve, settings["serve"], "serve") if "serve" in settings else None
    evaluate = reading.parse(Evaluate, settings["evaluate"], "evaluate") if "evaluate" in settings else None
    plan = load.from_config(settings, resources, tokens, node_mb, serve, evaluate)
    gate.check_possible(plan)
    if args.sweep and args.fit:
        raise BadInputError("--sweep and --fit are two questions", "ask one at a time")
    if args.sweep:
        chosen = alternatives.parse_sweep(args.sweep)
        found, left_out = alternatives.sweep(plan, chosen, settings["train"]["experts_per_shard"])
        for values, problem in left_out:
            said = " ".join(f"{key}={value}" for key, value in values.items())
            cli.say(f"left out: {said}: {problem}")
        if args.json:
            rows = [{"settings": chosen, **plan_text.figures(changed)} for chosen, changed in found]
            print(json.dumps(rows, indent=2))
        else:
            print(plan_text.sweep_table(plan, found))
        if alternatives.recommend(changed for _, changed in found) is None:
            raise GateError(
                "none of these alternatives fits", "; ".join(for_the_disk(plan) or ["sweep over more nodes, or --fit"])
            )
        return
    if args.fit:
        fewest = alternatives.fewest_nodes(plan, suffices)  # nodes do not change the disk, which is judged below
        if fewest is None:
            raise GateError(
                f"this experiment fits no number of nodes up to {alternatives.MOST_NODES}: {plan.binding}",
                "a larger sequence_parallel_size, a smaller micro_batch_size, or zero3_offload",
            )
        plan = fewest
        cli.say(f"fewest nodes: {plan.cluster.nodes}")
    figures = plan_text.figures(plan)
    hang_minutes = settings["train"].get("hang_minutes")
    written = plan_text.text(plan, args.explain, hang_minutes)
    print(json.dumps(figures, indent=2) if args.json else written)
    if args.output:
        files.write_text(args.output / "plan.txt", plan_text.text(plan, True, hang_minutes) + "\n")
        files.write_json(args.output / "plan.json", figures)
    gate.stop_unless_it_fits(plan, settings["plan"]["on_misfit"])
    if args.receipt:
        gate.check_limits(plan, hang_minutes, settings["plan"]["on_misfit"])
        receipts.write(
            args.receipt,
            args.rule,
            inputs=inputs,
            settings={"plan": settings["plan"], "train": settings["train"], "resources": resources},
            result={"plan": str(args.output / "plan.json"), "explained": str(args.output / "plan.txt")},
            figures=figures,
        )


if __name__ == "__main__":
    cli.run(main)
