"""Convert and verify a committed checkpoint of a training that goes on, without disturbing it.

    convert_snapshot.py results/EXPERIMENT --checkpoint step_200 --base DIR --dtype bf16 --mtp drop …

Everything goes to results/EXPERIMENT/snapshots/<run id>-step_200/: the model, and the receipts of convert_checkpoint
and verify_model. The checkpoint is held by hard links until it is converted, so that training may go on to remove old
ones. Options that are not named here are convert_checkpoint's.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, json_files
from deepseek_sft.settings import options
from deepseek_sft.settings.convert import Convert
from deepseek_sft.training import snapshot

SCRIPTS = Path(__file__).resolve().parent


def main() -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, help="results/<experiment>")
    parser.add_argument("--base", type=Path, required=True, help="model folder that training started from")
    options.add(parser, Convert, "checkpoint", "dtype", "mtp")
    parser.add_argument("--full", action="store_true", help="compare every value with the checkpoint, not samples")
    args, rest = parser.parse_known_args()
    taken = snapshot.hold(args.results, args.checkpoint)
    try:
        return convert(args, rest, taken)
    finally:
        taken.release()


def convert(args: argparse.Namespace, rest: list[str], taken: snapshot.Snapshot) -> int:
    """Convert, then verify; the exit code of the first that fails, else 0."""
    model = taken.folder / "model"
    kind = ["--dtype", args.dtype, "--mtp", args.mtp]
    common = ["--base", str(args.base), "--checkpoint", str(taken.held)]
    trained = json_files.read(taken.run / "settings.json", {"settings": dict})["settings"]
    bounds = {
        "--learning-rate": trained["learning_rate"],
        "--steps": taken.checkpoint.step,
        "--weight-decay": trained["weight_decay"],
        "--balance-bias-speed": trained.get("balance_bias_speed", 0.0),
    }
    verify = ["--model", str(model), *(str(word) for pair in bounds.items() for word in pair)]
    verify += ["--adam-betas", *map(str, trained["adam_betas"]), *(["--full"] if args.full else [])]
    for name, words in (("convert_checkpoint", ["--output", str(model), *rest]), ("verify_model", verify)):
        receipt = ["--receipt", str(taken.folder / f"{name}.json")]
        code = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", *common, *kind, *words, *receipt]).returncode
        if code:
            return code if code > 0 else 128 - code
    cli.say(f"{taken.checkpoint.folder.name} of run {taken.run.name}, converted and verified: {model}")
    return 0


if __name__ == "__main__":
    cli.run(main)
