"""Train on this node's share of the ranks; started once per node, inside the allocation (srun, one task per node).

    srun --ntasks-per-node=1 python workflow/scripts/train.py --base-receipt … --tokens-receipt … --settings … \\
        --output results/EXPERIMENT/train --receipt results/EXPERIMENT/receipts/train.json

Node rank and hosts come from Slurm's variables; without them it trains on this machine alone. The run goes to
<output>/runs/<run id>/ and continues from its newest committed checkpoint.

Stop: USR1 to this program, or the stop file, saves after the current step and exits with 4. SIGTERM stops at once
with 143 and loses what came after the last checkpoint; Ctrl-C likewise with 130.
Exit codes: 0 done, 2 bad input, 3 a gate failed (start checks, first loss, loss or gradient not finite, spike),
4 stopped and saved, 5 crash or hang, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import argparse
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft.training import early_stop

early_stop.catch()  # before the slow imports: Slurm's signal would kill this process until then

from deepseek_sft import cli, files  # noqa: E402
from deepseek_sft.slurm import nodes  # noqa: E402
from deepseek_sft.training import launch, rehearsal, stage  # noqa: E402


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--base-receipt", type=Path, required=True, help="receipt of prepare_model")
    parser.add_argument("--tokens-receipt", type=Path, required=True, help="receipt of tokenize_data")
    parser.add_argument(
        "--plan-receipt",
        type=Path,
        help="receipt of plan or refine_plan: its times decide limits, and its size is expert_parallel_size: auto",
    )
    parser.add_argument("--settings", type=Path, required=True, help="JSON file of training settings")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write")
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda", help="what to train on")
    parser.add_argument("--ranks-per-node", type=int, help="processes per node; default: one per GPU")
    parser.add_argument("--stop-file", type=Path, help="file whose appearance makes training save and stop")
    parser.add_argument(
        "--rehearse",
        choices=rehearsal.PARTS,
        help="train the first steps alone, in an --output of their own: unbroken, or resumed after the third; "
        "--receipt gets a record of it",
    )
    options = parser.parse_args()
    try:
        return train(options)
    finally:
        early_stop.ignore()


def train(options: argparse.Namespace) -> int:
    """Train on this node; returns the exit code."""
    files.require_writable(options.output / "runs", options.receipt)
    node = nodes.detect(options.accelerator, options.ranks_per_node)
    inputs = options.base_receipt, options.tokens_receipt, options.settings, options.output, node
    try:
        plan, spread = stage.planned(options.plan_receipt), stage.planned_spread(options.plan_receipt)
        if options.rehearse:
            run = rehearsal.prepare(*inputs, spread=spread)
            rehearsal.train(run, node, options.accelerator, options.rehearse, options.receipt, plan)
        else:
            run = stage.prepare(*inputs, spread=spread)
            stage.train(run, node, options.accelerator, options.stop_file, options.receipt, plan)
    except launch.Terminated as end:
        cli.say("terminated: nothing was saved since the last checkpoint; the same command continues from it")
        return end.exit_code
    return 0


if __name__ == "__main__":
    cli.run(main)
