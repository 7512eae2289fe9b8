"""Convert a ZeRO training checkpoint (stage 1, 2 or 3) into a Hugging Face folder, ready to be served.

Streams: only the FP32 master weights are read, each once, and compared with the checksums they were written with;
memory stays below a bound whatever the model's size; no code from the checkpoint is executed and no torch is needed.
Shards of fused experts become the release's tensors. Reads checkpoints of this workflow, and of stock xtuner or
DeepSpeed after checking that they are complete.

Nothing incomplete carries the output's name. Killed at any moment, the same command continues after the last complete
file. A finished conversion is recognised; changed inputs are refused unless --replace is given.

Several nodes: --nodes N in a Slurm allocation of N nodes; or --part 1/4 … --part 4/4 anywhere, at the same time or one
after the other, and then the same command without --part, which completes the folder (and whatever is missing).
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, files, receipts
from deepseek_sft.convert import base_model, convert, dry_run, output_tensors, zero
from deepseek_sft.errors import BadInputError, StoppedError
from deepseek_sft.formatting import byte_size
from deepseek_sft.settings import options
from deepseek_sft.settings.convert import Convert
from deepseek_sft.tensors import memory_bound, node_shares, swap
from deepseek_sft.tensors.model_writer import Progress, finished_files


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder with the ranks' *_states.pt files")
    parser.add_argument("--base", type=Path, required=True, help="model folder that training started from")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write")
    parser.add_argument("--receipt", type=Path, help="receipt to write; needed unless --part or --dry-run is given")
    options.add(parser, Convert, "dtype", "mtp", "max_shard_size", "memory", "workers")
    parser.add_argument(
        "--swap", choices=["off", "auto"], default="off", help="auto: a --memory above what is free gets a swap file"
    )
    parser.add_argument("--swap-folder", type=Path, default=Path("/var/tmp"), help="local disk for that swap file")
    parser.add_argument("--no-checksums", action="store_true", help="do not compare with the checkpoint's CRC-32")
    parser.add_argument(
        "--missing-from-base",
        action="store_true",
        help="take parameters that the checkpoint does not hold from the base (frozen, exclude_frozen_parameters)",
    )
    parser.add_argument("--part", metavar="K/N", help="write only this share; slurm: this task of srun or a job array")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of this Slurm job that write a share each")
    parser.add_argument("--replace", action="store_true", help="let a result made from other inputs give way")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan as JSON, write nothing"
    )
    args = parser.parse_args()
    if not (args.receipt or args.part or args.dry_run):
        parser.error("--receipt is needed unless --part or --dry-run is given")
    return args


def _stop(_number: int, _frame: object) -> None:
    raise StoppedError("stopped by SIGTERM", "the same command goes on after the last complete file")


def main() -> None:
    args = arguments()
    signal.signal(signal.SIGTERM, _stop)  # so that a swap file is removed and the log says why it ended
    options = convert.Options(
        dtype=args.dtype,
        mtp=args.mtp,
        largest_shard=output_tensors.shard_size(args.max_shard_size),
        memory=args.memory,
        workers=max(0, args.workers),
        replace=args.replace,
        swap=args.swap == "auto",
        swap_folder=args.swap_folder,
        part=node_shares.parse_part(args.part) if args.part else None,
        checksums=not args.no_checksums,
        missing_from_base=args.missing_from_base,
    )
    if args.nodes < 1:
        raise BadInputError(f"--nodes {args.nodes} is not a number of nodes")
    if not args.dry_run:
        files.require_writable(None if args.output.exists() else args.output, args.receipt)
    swap.remove_stale(args.output)
    checkpoint = zero.open_checkpoint(args.checkpoint)
    base = base_model.open_model(args.base)
    conversion = convert.prepare(checkpoint, base, args.output, options)
    if args.dry_run:
        plan = dry_run.describe(conversion, args.nodes)
        cli.say(dry_run.summary(plan))
        print(dry_run.text(plan))
        return
    started = time.monotonic()
    if args.nodes > 1:
        earlier = finished_files(conversion.plan)
        node_shares.run_on_nodes(args.nodes, [*sys.argv, "--nodes=1", "--part=slurm"])
    progress, bytes_read, seconds = convert.run(conversion)
    _tell(args, conversion, progress, seconds)
    if options.part:
        return
    if args.nodes > 1 and not progress.already_complete:  # what the nodes did, this process knows by its result
        seconds = time.monotonic() - started
        progress.kept = len(earlier)
        progress.written = conversion.bytes_to_write - sum(shard.size for shard in earlier)
        bytes_read = conversion.bytes_to_read * progress.written // conversion.bytes_to_write
    figures = {
        "parameters": conversion.parameters,
        "tensors": len(conversion.sources),
        "shards": len(conversion.shards),
        "bytes": conversion.bytes_to_write,
        "bytes_read": bytes_read,
        "bytes_written": progress.written,
        "seconds": round(seconds, 3),
        "gib_per_second": round((bytes_read + progress.written) / seconds / 2**30, 3),
        "peak_rss_mib": round(memory_bound.peak_resident() / 2**20, 1),
        "non_finite": sum(progress.non_finite.values()),
        "step": checkpoint.step,
        "world_size": checkpoint.world_size,
        "committed": checkpoint.marker is not None,
        "files_kept_from_earlier_run": progress.kept,
        "nodes": args.nodes,
    } | progress.figures
    receipts.write(
        args.receipt,
        "convert_checkpoint",
        inputs={
            "checkpoint": {"path": str(args.checkpoint), "fingerprint": checkpoint.fingerprint},
            "base": {"path": str(args.base), "fingerprint": base.fingerprint},
        },
        settings={name: getattr(options, name) for name in ("dtype", "mtp", "largest_shard")},
        result={"model": str(args.output)},
        figures=figures,
    )


def _tell(args: argparse.Namespace, conversion: convert.Conversion, progress: Progress, seconds: float) -> None:
    non_finite = progress.non_finite
    if non_finite:
        count, names = sum(non_finite.values()), ", ".join(list(non_finite)[:5])
        cli.say(f"warning: {count} values are infinite or not numbers, in {names}")
    peak = byte_size(memory_bound.peak_resident())
    if progress.already_complete:
        cli.say(f"{args.output} is complete already, made from the same checkpoint and base: nothing to do")
    elif part := conversion.options.part:
        cli.say(f"part {part} is complete in {seconds:.1f} s, {len(progress.done)} files, peak memory {peak}")
    else:
        cli.say(f"converted {conversion.parameters:,} parameters in {seconds:.1f} s, peak memory {peak}: {args.output}")


if __name__ == "__main__":
    cli.run(main)
