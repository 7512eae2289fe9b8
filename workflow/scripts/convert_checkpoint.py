"""Convert a ZeRO training checkpoint (stage 1, 2 or 3) into a Hugging Face folder, ready to be served.

Streams: only the FP32 master weights are read, each once; memory stays below a bound whatever the model's size; no code
from the checkpoint is executed and no torch is needed. Shards of fused experts become the release's tensors. Reads
checkpoints of this workflow, and of stock xtuner or DeepSpeed after checking that they are complete.

Nothing incomplete carries the output's name. Killed at any moment, the same command continues after the last complete
file. A finished conversion is recognised; changed inputs are refused unless --replace is given.
"""

import argparse
import dataclasses
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, receipts
from deepseek_sft.checkpoint import base_model, convert, memory, outputs, zero
from deepseek_sft.checkpoint.sizes import show_size


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with the ranks' *_states.pt files")
    parser.add_argument("--base", type=Path, required=True, help="model folder that training started from")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write")
    parser.add_argument("--dtype", choices=sorted(outputs.DTYPES), default="bf16", help="of the weights")
    parser.add_argument(
        "--mtp",
        choices=["drop", "copy"],
        default="drop",
        help="the multi-token-prediction layer, not trained: drop, or copy the base's",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="largest output file; base: files named and filled as the base's"
    )
    parser.add_argument("--memory", default="auto", help="bound of all buffers together: auto or a size (512MiB)")
    parser.add_argument("--swap", choices=["off"], default="off", help="streaming needs none")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: two per core, at most 8")
    parser.add_argument("--replace", action="store_true", help="let a result made from other inputs give way")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan as JSON, write nothing"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    options = convert.Options(
        args.dtype, args.mtp, outputs.shard_size(args.max_shard_size), args.memory, max(0, args.workers), args.replace
    )
    checkpoint = zero.open_checkpoint(args.checkpoint)
    base = base_model.open_model(args.base)
    conversion = convert.prepare(checkpoint, base, args.output, options)
    if args.dry_run:
        print(convert.describe(conversion))
        return
    progress, bytes_read, seconds = convert.run(conversion)
    non_finite = sum(progress.non_finite.values())
    if progress.already_complete:
        cli.say(f"{args.output} is complete already, made from the same checkpoint and base: nothing to do")
    if non_finite:
        cli.say(
            f"warning: {non_finite} values are infinite or not numbers, in {', '.join(list(progress.non_finite)[:5])}"
        )
    figures = {
        "parameters": conversion.parameters,
        "tensors": len(conversion.sources),
        "shards": len(conversion.shards),
        "bytes_read": bytes_read,
        "bytes_written": progress.written,
        "seconds": round(seconds, 3),
        "gib_per_second": round((bytes_read + progress.written) / seconds / 2**30, 3),
        "peak_rss_mib": round(memory.peak_resident() / 2**20, 1),
        "non_finite": non_finite,
        "step": checkpoint.step,
        "world_size": checkpoint.world_size,
        "committed": checkpoint.marker is not None,
        "files_kept_from_earlier_run": progress.kept,
    }
    receipts.write(
        args.receipt,
        "convert_checkpoint",
        inputs={
            "checkpoint": {"path": str(args.checkpoint), "fingerprint": checkpoint.fingerprint},
            "base": {"path": str(args.base), "fingerprint": base.fingerprint},
        },
        settings={k: v for k, v in dataclasses.asdict(options).items() if k in ("dtype", "mtp", "largest_shard")},
        result={"model": str(args.output)},
        figures=figures,
    )
    if not progress.already_complete:
        peak = show_size(memory.peak_resident())
        cli.say(f"converted {conversion.parameters:,} parameters in {seconds:.1f} s, peak memory {peak}: {args.output}")


if __name__ == "__main__":
    cli.run(main)
