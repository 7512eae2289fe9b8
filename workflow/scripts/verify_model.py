"""Prove that a converted model is what training made of the base model.

Against the base: names, shapes, dtypes, config, tokenizer; all values finite; untouched tensors equal; no weight moved
further than AdamW can move it (with --train-receipt, or --learning-rate and --steps), or than 100 % of a tensor's norm
(without). Router biases equal the base's, unless the run moved them (--balance-bias-speed): then by no more than that.
What the run froze (--freeze) equals the base's.
Against the checkpoint, if given: equal bit for bit, in samples of every tensor or, with --full, everywhere. An FP8
model is compared code by code and factor by factor, and its dequantised values with the master weights. Tensors whose
FP32 master weights equal the base bit for bit were never stepped, and fail.
A verified model gets README.md, a card of what it was made from, where the receipts of its chain lie beside --receipt.
Exit code 3 and the names of all failing tensors and files if a check fails; the receipt holds every file's sha256.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files, json_files, receipts
from deepseek_sft.convert import base_model, output_tensors, zero
from deepseek_sft.data import loss_rows
from deepseek_sft.errors import BadInputError
from deepseek_sft.json_files import Maybe
from deepseek_sft.tensors import memory_bound
from deepseek_sft.verify import model_card, verify
from deepseek_sft.verify.weight_checks import ChangeBound


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="converted model folder")
    parser.add_argument("--base", type=Path, required=True, help="model folder that training started from")
    parser.add_argument("--checkpoint", "--against", type=Path, help="checkpoint folder it was converted from")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write")
    parser.add_argument("--train-receipt", type=Path, help="take the six settings below from this receipt of train")
    parser.add_argument("--learning-rate", type=float, help="highest learning rate of the run")
    parser.add_argument("--steps", type=int, help="optimiser steps of the run")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW; a larger value loosens the bound")
    parser.add_argument("--adam-betas", type=float, nargs=2, default=[0.9, 0.999], help="of AdamW")
    parser.add_argument("--balance-bias-speed", type=float, default=0.0, help="by which a router's bias moves a step")
    parser.add_argument("--freeze", nargs="*", choices=["router"], default=[], help="what the run left as it was")
    parser.add_argument(
        "--dtype", choices=sorted(output_tensors.DTYPES), help="format that it must have (else: what it says)"
    )
    parser.add_argument("--mtp", choices=["drop", "copy"], help="what must have become of that layer, with --dtype")
    parser.add_argument("--full", action="store_true", help="compare every value with the checkpoint, not samples")
    parser.add_argument(
        "--missing-from-base",
        action="store_true",
        help="parameters not in the checkpoint were frozen: equal the base's",
    )
    parser.add_argument("--workers", type=int, default=8, help="files checked at the same time")
    args = parser.parse_args()
    if args.train_receipt:
        rates = {"learning_rate": float, "weight_decay": float, "balance_bias_speed": json_files.Maybe(float)}
        needs = {"settings": {**rates, "adam_betas": list}, "figures": {"steps": int, "converted_step": Maybe(int)}}
        train = receipts.read(args.train_receipt, "train", needs)
        for name in ("learning_rate", "weight_decay", "adam_betas"):
            setattr(args, name, train["settings"][name])
        args.balance_bias_speed = train["settings"].get("balance_bias_speed", 0.0)
        args.freeze = train["settings"].get("freeze", [])
        converted = train["figures"].get("converted_step")
        args.steps = train["figures"]["steps"] if converted is None else converted  # not always the last
    return args


def main() -> None:
    args = arguments()
    files.require_writable(args.receipt)
    for name in ("learning_rate", "steps", "weight_decay", "balance_bias_speed"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise BadInputError(f"--{name.replace('_', '-')} {value} is no bound")
    if (args.learning_rate is None) != (args.steps is None):
        raise BadInputError("the bound on changes needs both --learning-rate and --steps, or neither")
    if (args.dtype is None) != (args.mtp is None):
        raise BadInputError("the expected kind of model needs both --dtype and --mtp, or neither")
    if not args.model.is_dir():
        raise BadInputError(f"model folder {args.model} does not exist", "convert a checkpoint first")
    bound = None
    if args.steps is not None:
        betas = tuple(args.adam_betas)
        bound = ChangeBound.of(args.learning_rate, args.steps, args.weight_decay, betas, args.balance_bias_speed)
    base = base_model.open_model(args.base)
    checkpoint = zero.open_checkpoint(args.checkpoint) if args.checkpoint else None
    wanted = verify.Kind(args.dtype, args.mtp) if args.dtype else None
    result = verify.verify(
        args.model,
        base,
        checkpoint,
        bound,
        args.full,
        max(1, args.workers),
        wanted,
        args.missing_from_base,
        args.freeze,
    )
    for name, check in result.checks.items():
        cli.say(f"FAILED  {name}" if check.failures else f"passed  {name}: {check.detail}")
    checks = {n: {"passed": not check.failures, "detail": check.detail} for n, check in result.checks.items()}
    if not all(check["passed"] for check in checks.values()):
        receipts.write_failed(args.receipt, "verify_model", result.figures | {"checks": checks})
    result.require(args.model)
    inputs = {"base": {"path": str(args.base), "fingerprint": base.fingerprint}}
    if checkpoint:
        inputs["checkpoint"] = {"path": str(args.checkpoint), "fingerprint": checkpoint.fingerprint}
    shown = ("dtype", "mtp", "learning_rate", "steps", "weight_decay", "adam_betas", "balance_bias_speed", "full")
    settings = {name: getattr(args, name) for name in shown} | ({"freeze": args.freeze} if args.freeze else {})
    verified = result.figures | {"checks": checks}
    if model_card.write(args.model, args.receipt, args.base, verified):
        card = args.model / model_card.NAME
        verified["sha256"][card.name] = files.fingerprint_file(card, full=True).removeprefix("sha256:")
    receipts.write(
        args.receipt,
        "verify_model",
        inputs=inputs,
        settings=settings,
        result={"model": str(args.model)},
        figures=verified
        | {"peak_rss_mib": round(memory_bound.peak_resident() / 2**20, 1)}
        | trained_losses(checkpoint),
    )


def trained_losses(checkpoint: zero.Checkpoint | None) -> dict[str, Any]:
    """What training left for the smoke test with the weights that this model was compared with."""
    marker = checkpoint.marker if checkpoint else None
    return {loss_rows.KEY: marker.trained_losses} if marker and marker.trained_losses else {}


if __name__ == "__main__":
    cli.run(main)
