"""Grouped products against the loop, forward and backward: counts with zeros in every place, sizes of DeepSeek-V3."""

import torch
from check import Place, Row
from measuring import error, milliseconds

from deepseek_sft.model import expert_products
from deepseek_sft.model.expert_products import Counts, ExpertProducts, counts_of_shards

BOUND = 2e-2  # bf16, products of 7,168 elements added in another order


def counts_of(experts: int, tokens: int) -> dict[str, list[int]]:
    even = [tokens // experts] * experts
    return {
        "even": even,
        "none first": [0, *even[1:]],
        "none last": [*even[:-1], 0],
        "one expert has all": [0] * (experts // 2) + [tokens] + [0] * (experts - experts // 2 - 1),
        "one row": [0] * (experts - 1) + [1],
        "odd": [max(0, number + 13 * (index % 3) - 9) for index, number in enumerate(even)],
    }


def of_shard(counts: list[int], grouped: bool, device: torch.device) -> Counts:
    """As a layer of this one shard makes them."""
    (found,) = counts_of_shards(torch.tensor(counts, device=device), len(counts), grouped)
    return found


def passes(counts: Counts, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    rows, w1w3, w2 = (tensor.detach().requires_grad_() for tensor in tensors)
    output = ExpertProducts.apply(rows[: sum(counts.rows)], w1w3, w2, counts)
    output.float().square().sum().backward()
    return [output.detach(), rows.grad, w1w3.grad, w2.grad]


def rows(place: Place) -> list[Row]:
    hidden, ffn, experts = place.sizes((7168, 2048, 8), (64, 32, 4))
    tokens = place.sizes(4096, 96)
    generator = torch.Generator(place.device).manual_seed(0)
    shapes = (tokens + 64 * experts, hidden), (experts, 2 * ffn, hidden), (experts, hidden, ffn)
    made = [torch.randn(shape, generator=generator, device=place.device) * 0.02 for shape in shapes]
    tensors = [tensor.bfloat16() for tensor in made]
    device = torch.device(place.device)
    chosen = expert_products.choose("auto", device, torch.bfloat16, hidden, ffn)
    found = [Row("auto takes grouped products", None, {"chosen": chosen, "hidden": hidden, "ffn": ffn})]
    for name, counts in counts_of(experts, tokens).items():
        loop, grouped = (passes(of_shard(counts, kind, device), tensors) for kind in (False, True))
        apart = [error(one, other) for one, other in zip(grouped, loop, strict=True)]
        empty = all(not gradient[i].any() for gradient in grouped[2:] for i, count in enumerate(counts) if not count)
        again = passes(of_shard(counts, True, device), tensors)
        same = all(torch.equal(one, other) for one, other in zip(again, grouped, strict=True))
        figures = {"error": max(apart), "gradients of empty experts are 0": empty, "repeats bit for bit": same}
        found.append(Row(f"{experts} experts, {name}", max(apart) < BOUND and empty, figures))
    for each in place.sizes((16, 128, 512), (4, 16)):
        counts = [each] * experts
        figures = {}
        for kind, grouped in (("loop", False), ("grouped", True)):
            shard = of_shard(counts, grouped, device)
            figures[f"{kind} ms"] = milliseconds(place.device, lambda c=shard: passes(c, tensors))
        done = 3 * 6 * each * experts * hidden * ffn
        figures["grouped TFLOP/s"] = round(done / figures["grouped ms"] / 1e9, 4)
        found.append(Row(f"{each} tokens an expert, forward and backward", None, figures))
    if place.device == "cuda":
        found.append(synchronisations(tensors, [tokens // experts] * experts))
    return found


def synchronisations(tensors: list[torch.Tensor], counts: list[int]) -> Row:
    """Whether the host waits for the device inside a shard; said, not judged."""
    made = of_shard(counts, True, tensors[0].device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes(made, tensors)
        waits = "none"
    except RuntimeError as caught:
        waits = str(caught).splitlines()[0][:120]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Row("waits of the host inside a shard", None, {"first": waits})
