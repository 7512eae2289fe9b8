"""What tests of the conversion engine share: small inputs in several files, and one call."""

import large_zero3
import small_models

from deepseek_sft.convert import base_model, convert, zero

RANKS = 5


def write_inputs(folder):
    """``folder/base`` and ``folder/step``, a checkpoint of it with content."""
    specs = large_zero3.write_base(folder / "base", small_models.SHAPE)
    large_zero3.write_checkpoint(folder / "step", specs, RANKS, experts_per_shard=2, sub_group_size=1000)
    return folder


def convert_all(inputs, output, **options):
    """Convert ``inputs/step``; (conversion, result of ``convert.run``)."""
    opened = zero.open_checkpoint(inputs / "step"), base_model.open_model(inputs / "base")
    conversion = convert.prepare(*opened, output, convert.Options(largest_shard=20_000, workers=2, **options))
    return conversion, convert.run(conversion)
