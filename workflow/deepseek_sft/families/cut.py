"""A real base with fewer layers: the same vocabulary, widths and experts on one node.

The first layers stay where they are. Where all of them would be dense, the last of those asked for is the base's first
layer with experts instead: a model without experts would rehearse another path. Multi-token-prediction layers follow.
"""

from pathlib import Path
from typing import Any

from ..errors import BadInputError
from . import checked

PER_LAYER = ("layer_types", "mlp_layer_types")  # lists in config.json with an entry for each layer


def kept_layers(config: dict[str, Any], layers: int, path: Path) -> list[int]:
    """Indices of the base's layers that make the smaller model, in order.

    Args:
        config: in the releases' names, checked.
        layers: how many.
        path: of ``config.json``, for messages.

    Raises:
        BadInputError: there are not more of them than that, or the cut would have no layer with experts.
    """
    total = config["num_hidden_layers"]
    if not 1 <= layers < total:
        raise BadInputError(
            f"{path}: {layers} layers are asked for, the base has {total}",
            f"give a number from 2 to {total - 1} (model.layers, --layers), or none for the whole base",
        )
    dense = config.get("first_k_dense_replace") or 0
    if dense >= total:
        raise BadInputError(f"{path}: no layer of the base has experts", "give a base of the DeepSeek-V3 architecture")
    if dense < layers:
        return list(range(layers))
    if layers == 1:
        raise BadInputError(
            f"{path}: one layer is asked for, and the first is dense", "ask for 2 or more (model.layers, --layers)"
        )
    return [*range(layers - 1), dense]


def config_of(published: dict[str, Any], layers: int, path: Path) -> dict[str, Any]:
    """``config.json`` of the smaller model, in the names that the base's has.

    Raises:
        BadInputError: see ``kept_layers``.
    """
    kept = kept_layers(checked(published, path), layers, path)
    changed: dict[str, Any] = {"num_hidden_layers": layers}
    if published.get("first_k_dense_replace"):
        changed["first_k_dense_replace"] = min(published["first_k_dense_replace"], layers - 1)
    total = published["num_hidden_layers"]
    for key in PER_LAYER:
        entries = published.get(key)
        if isinstance(entries, list) and len(entries) == total:
            changed[key] = [entries[layer] for layer in kept]
    return published | changed
