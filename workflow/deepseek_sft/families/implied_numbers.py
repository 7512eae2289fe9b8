"""The numbers that a ``config.json`` implies, by the formulas of the releases' ``modeling_deepseek.py``; no torch.

They are computed here on their own, in double precision, so that what a library makes of the same keys can be compared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import config_file

TOLERANCE = 1e-5  # relative: frequencies are computed in FP32


@dataclass(frozen=True)
class Numbers:
    """What decides attention and routing besides the weights.

    Attributes:
        frequencies: of the rotary embedding, radians per position, float64 [qk_rope_head_dim / 2].
        attention_factor: by which cosines and sines are multiplied.
        softmax_scale: by which scores are multiplied.
        routed_scaling_factor: by which the weights of the routed experts are multiplied.
        normalised: whether those weights are made to sum up to 1 first.
    """

    frequencies: NDArray[np.float64]
    attention_factor: float
    softmax_scale: float
    routed_scaling_factor: float
    normalised: bool


def numbers(config: Mapping[str, Any]) -> Numbers:
    """
    Args:
        config: in the releases' names (``families.read_config``).
    """
    scaling = config_file.yarn(config)
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    if scaling:
        scale *= config_file.mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
    return Numbers(
        frequencies=_frequencies(config["qk_rope_head_dim"], float(config["rope_theta"]), scaling),
        attention_factor=config_file.attention_factor(scaling) if scaling else 1.0,
        softmax_scale=scale,
        routed_scaling_factor=float(config["routed_scaling_factor"]),
        normalised=bool(config["norm_topk_prob"]),
    )


def _frequencies(size: int, theta: float, scaling: dict[str, float] | None) -> NDArray[np.float64]:
    plain = theta ** -(np.arange(0, size, 2) / size)
    if not scaling:
        return plain

    def dimension(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension(scaling["beta_slow"])), size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / scaling["factor"] * ramp + plain * (1 - ramp)


def differ(found: Any, wanted: Any) -> bool:
    """Whether numbers are not the same within ``TOLERANCE``; NaN and another shape differ from everything."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return found.shape != wanted.shape or not bool(np.all(np.abs(found - wanted) <= TOLERANCE * np.abs(wanted)))
