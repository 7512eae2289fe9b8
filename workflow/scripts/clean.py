"""Free the space of old checkpoints once the converted model is verified.

  clean.py results/EXPERIMENT             shows what would go and what stays
  clean.py results/EXPERIMENT --free      removes it; `snakemake clean` does this
  clean.py results/EXPERIMENT --newest    counts the newest committed checkpoint in: the run cannot be continued then,
                                          and converting again means training again

Of the run that the receipts name, all checkpoint folders but the newest committed one go. Other runs, metrics and logs
stay. Exit code 3 where the model is not verified or was made from another checkpoint, 2 where the run is in use or a
receipt is missing: then nothing is removed.
"""

import argparse
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli
from deepseek_sft.report.formatting import byte_size
from deepseek_sft.training import retention


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("results", type=Path, help="results/<experiment>")
    parser.add_argument("--free", action=argparse.BooleanOptionalAction, default=False, help="remove it")
    parser.add_argument(
        "--newest", action=argparse.BooleanOptionalAction, default=False, help="the newest committed checkpoint too"
    )
    options = parser.parse_args()
    removal = retention.choose(options.results, options.newest)
    for item in removal.items:
        print(
            f"{'remove' if options.free else 'would remove'}  {byte_size(item.bytes):>12}  {item.folder} ({item.why})"
        )
    for folder in removal.kept:
        print(f"keep  {folder}")
    print(f"{byte_size(removal.bytes)} in {len(removal.items)} folders", flush=True)
    if options.free:
        retention.remove(removal)
    elif removal.items:
        print("nothing was removed: add --free")


if __name__ == "__main__":
    cli.run(main)
