"""Make sure that the base model is complete and in BF16, ready to be trained.

  prepare_model.py --base DIR --output DIR --receipt R     check a model folder of the DeepSeek-V3 architecture
  prepare_model.py --tiny --output DIR --receipt R         make a small random model of the same architecture

A BF16 folder is checked (config, files, index, names, shapes, dtypes) and used where it lies; nothing is copied.
A folder in the official release's FP8 format is dequantised to --output by streaming: bounded memory, no GPU; killed at
any moment, the same command continues after the last complete file.
The multi-token-prediction layer is not trained: it is recognised, and dropped where a model is written unless
--mtp copy (or keep: if there is one) is given, for convert_checkpoint --mtp copy.
With --layers N the first N layers become a model of their own in --output: real vocabulary, widths and experts, on one
node. At least one of them has experts.
With --servable DIR a folder of links that servers read without code of the base is made, to measure the base
(measure_held_out.py): tiktoken.model is there as an equal tokenizer.json.
The tiny model has the release's config keys and tensor names and the real tokenizer, and needs no GPU and no torch.
The receipt's result.base is the folder to train from, result.sums the file with the sums of its files, which training
compares.
"""

import argparse
import dataclasses
from pathlib import Path

import _bootstrap  # noqa: F401

from deepseek_sft import cli, families, files, receipts
from deepseek_sft.convert import base_model, base_sums, cut_base, dequantize, servable, tiny_model
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import config_file
from deepseek_sft.settings import options
from deepseek_sft.settings.convert import Convert
from deepseek_sft.settings.model import Tiny
from deepseek_sft.tensors import memory_bound
from deepseek_sft.tensors.sizes import parse_size

DESCRIPTIONS = {
    "dense_layers": "leading layers without experts",
    "groups": "expert groups",
    "groups_used": "groups a token may choose from",
}


def arguments() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--base", type=Path, help="model folder to check")
    source.add_argument("--tiny", action="store_true", help="make a small random model")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, where something is written")
    parser.add_argument("--receipt", type=Path, required=True, help="receipt to write")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file written (tiny model: at most 8MB)")
    parser.add_argument("--replace", action="store_true", help="let an --output made from something else give way")
    parser.add_argument(
        "--layers", type=int, help="decoder layers; of a base, the first so many (default: all of them)"
    )
    parser.add_argument("--servable", type=Path, help="folder to make for serving the base itself")
    streaming = parser.add_argument_group("dequantising and cutting")
    options.add(streaming, Convert, "memory", "workers")
    streaming.add_argument(
        "--mtp",
        choices=["drop", "copy", "keep"],
        default="drop",
        help="the multi-token-prediction layer, which is not trained; keep: copy if there is one",
    )
    sizes = parser.add_argument_group("tiny model")
    options.add(sizes, Tiny, "seed")
    for field in dataclasses.fields(tiny_model.TinyShape):
        option = "--" + field.name.replace("_", "-")
        description = DESCRIPTIONS.get(field.name, field.name.replace("_", " "))
        if field.name != "layers":
            sizes.add_argument(option, type=type(field.default), default=field.default, help=description)
    args = parser.parse_args()
    if args.tiny and args.layers is None:
        args.layers = tiny_model.TinyShape.layers
    return args


def _has_mtp(base: base_model.BaseModel) -> bool:
    """Whether there is a multi-token-prediction layer that can be kept; one that is not whole is said."""
    try:
        return base.mtp_layers > 0
    except BadInputError as error:
        cli.say(f"note: {error.problem}; it is dropped")
        return False


def _tell(base: base_model.BaseModel) -> None:
    """Say what of the base's configuration changes nothing here."""
    _, idle = config_file.unknown_keys(base.published)
    if idle:
        cli.say(f"note: config.json has keys that are not known and switch nothing on: {', '.join(idle)}")
    if base.config != base.published:
        cli.say("note: config.json is read in the names of transformers 5 (rope_parameters, dtype)")
    named = base.config.get("num_nextn_predict_layers") or 0
    held = {name.split(".")[2] for name in base.mtp}
    if base.mtp and named != len(held):
        cli.say(
            f"note: config.json says num_nextn_predict_layers {named}, the files hold {len(held)}; "
            "convert_checkpoint --mtp copy writes the number that it copies"
        )


def main() -> None:
    args = arguments()
    largest_shard = parse_size(args.max_shard_size)
    files.require_writable(args.receipt, args.output if args.tiny and not args.output.exists() else None)
    inputs, settings, source = {}, {}, args.output
    dequantized = False
    if args.tiny:
        shape = tiny_model.TinyShape(
            **{f.name: getattr(args, f.name) for f in dataclasses.fields(tiny_model.TinyShape)}
        )
        tiny_model.write_tiny(args.output, shape, args.seed, min(largest_shard, tiny_model.LARGEST_SHARD), args.replace)
        settings = {"tiny": dataclasses.asdict(shape), "seed": args.seed}
    else:
        source = args.base
        families.read_trainable(source)
        base = base_model.open_model(source)
        _tell(base)
        inputs = {"base": {"path": str(source), "fingerprint": base.fingerprint}}
        if args.layers is not None:
            base = cut_base.cut_base(base, args.layers)
            settings = {"layers": args.layers}
        if base.quantised or args.layers is not None:
            files.require_writable(None if args.output.exists() else args.output)
            mtp = ("copy" if _has_mtp(base) else "drop") if args.mtp == "keep" else args.mtp
            options = dequantize.Options(mtp, largest_shard, args.memory, max(0, args.workers), args.replace)
            dequantize.dequantize(base, args.output, options)
            source, dequantized = args.output, base.quantised
    prepared = base_model.open_model(source)
    figures = base_model.figures(prepared) | {
        "dequantised": dequantized,
        "fingerprint": prepared.fingerprint,
        "peak_rss_mib": round(memory_bound.peak_resident() / 2**20, 1),
    }
    if dequantized:
        figures["non_finite"] = 0  # others are refused; of a BF16 base no value is read here
    if args.servable:
        servable.link(prepared, args.servable)
    sums = base_sums.place(args.receipt)
    base_sums.write(sums, source, prepared.files, max(0, args.workers))
    result = {"base": str(source), "sums": str(sums)}
    receipts.write(args.receipt, "prepare_model", inputs=inputs, settings=settings, result=result, figures=figures)
    cli.say(f"{source}: {figures['parameters']:,} parameters in {figures['tensors']} tensors, BF16, complete")


if __name__ == "__main__":
    cli.run(main)
