"""The output layer's loss at 129,280 × 7,168: memory beside the plan's terms, against cross-entropy at once."""

import torch
import torch.nn.functional as F
from check import Place, Row
from measuring import GIB, error, milliseconds, peak_gib
from shapes import configuration

BOUND = 2e-2  # bf16 logits
MARGIN = 1.25


def rows(place: Place) -> list[Row]:
    from deepseek_sft.model.loss import MAX_LOGITS, OutputLayer

    published = configuration(place)
    vocabulary, hidden = published["vocab_size"], published["hidden_size"]
    tokens = place.sizes(8192, 64)
    generator = torch.Generator(place.device).manual_seed(0)
    layer = OutputLayer(hidden, vocabulary, bias=False, device=place.device, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(vocabulary, hidden, generator=generator, device=place.device) * 0.02)
    states = torch.randn(tokens, hidden, generator=generator, device=place.device).bfloat16()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device=place.device)

    def step(count: int = tokens) -> list[torch.Tensor]:
        layer.weight.grad = None
        leaf = states[:count].detach().requires_grad_()
        loss = layer(leaf, labels[:count])
        loss.backward()
        return [loss.detach(), leaf.grad, layer.weight.grad]

    few = place.sizes(512, 32)
    mine = step(few)
    leaf, weight = states[:few].detach().requires_grad_(), layer.weight.detach().requires_grad_()
    wanted = F.cross_entropy((leaf @ weight.T).float(), labels[:few], reduction="sum")
    wanted.backward()
    apart = [error(a, b) for a, b in zip(mine, (wanted.detach(), leaf.grad, weight.grad), strict=True)]
    del mine, leaf, weight, wanted
    layer.weight.grad = None
    seen = peak_gib(place.device, step)
    chunk = min(MAX_LOGITS[place.device], tokens * vocabulary)
    planned = ((4 + 2) * vocabulary * hidden + (2 * 2 + 4) * chunk + (4 + 3 * 2) * hidden * tokens) / GIB
    none = step(0)
    fits = None if seen is None else seen <= MARGIN * planned
    return [
        Row(f"loss of {few} tokens and its gradients", max(apart) < BOUND, {"error": max(apart)}),
        Row(
            f"{tokens} tokens, {vocabulary:,} × {hidden:,}: memory",
            fits,
            {"seen GiB": seen, "planned GiB": round(planned, 3)},
        ),
        Row("no token: loss and gradients are 0", not none[0].any() and not none[2].any(), {}),
        Row("forward and backward", None, {"ms": milliseconds(place.device, step, 3)}),
    ]
