"""One mixture-of-experts layer of full size, forward and backward: memory beside the plan's terms, repeatability."""

import torch
from check import Place, Row
from measuring import GIB, milliseconds, peak_gib
from shapes import configuration, model_of, training

EXPERT_TERMS = ("router input", "dispatched inputs", "inside experts", "expert outputs", "shared experts")
MARGIN = 1.25  # of what is seen over the plan's terms: the allocator's rounding and the rows' bookkeeping


def rows(place: Place) -> list[Row]:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

    from deepseek_sft.model import expert_products
    from deepseek_sft.model.experts import MixtureOfExperts

    published = configuration(place)
    shard, tokens = place.sizes((8, 8192), (4, 64))
    config = DeepseekV3Config.from_dict(published)
    config.experts_per_shard = shard
    device, dtype = torch.device(place.device), torch.bfloat16
    config.grouped_products = expert_products.choose(
        "auto", device, dtype, config.hidden_size, config.moe_intermediate_size
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        layer = MixtureOfExperts(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.02)
    layer.gate.e_score_correction_bias = torch.zeros(config.n_routed_experts, device=device)
    hidden = torch.randn(1, tokens, config.hidden_size, device=device).bfloat16()

    def step() -> list[torch.Tensor]:
        for parameter in layer.parameters():
            parameter.grad = None
        leaf = hidden.detach().requires_grad_()
        output = layer(leaf)
        output.float().square().mean().backward()
        return [output.detach(), leaf.grad, layer.experts["0"].w1w3.grad]

    first, second = step(), step()
    same = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for parameter in layer.parameters():
        parameter.grad = None
    del first, second

    def activations() -> None:
        """Each shard's gradients are made and let go of, as ZeRO-3 does: only the input's is kept."""
        leaf = hidden.detach().requires_grad_()
        torch.autograd.grad(layer(leaf).float().square().mean(), leaf)

    seen = peak_gib(place.device, activations)
    model, settings = model_of(published), training(shard)
    planned = expected_gib(model, settings, tokens)
    weights = sum(parameter.numel() for parameter in layer.parameters()) * 2 / GIB
    fits = None if seen is None else seen <= MARGIN * planned
    memory = {"seen GiB": seen, "planned GiB": round(planned, 3), "weights GiB": round(weights, 3)}
    return [
        Row(f"layer of {config.n_routed_experts} experts, {tokens} tokens: memory", fits, memory),
        Row("the same gradients again, bit for bit", same, {}),
        Row("forward and backward", None, {"ms": milliseconds(place.device, step, 3), "tokens": tokens}),
    ]


def expected_gib(model, settings, tokens: int) -> float:
    """The plan's terms for what the layer keeps, the temporaries of its backward pass, and one shard's gradients."""
    from deepseek_sft.planning import device_memory

    kept = [term for term in device_memory.saved_per_token(model, settings, True) if term.name in EXPERT_TERMS]
    assert len(kept) == len(EXPERT_TERMS), "the plan's terms have other names"
    each = sum(term.value for term in kept) + device_memory.backward_per_token(model, settings, True).value
    shard = settings.experts_per_shard * model.expert_parameters
    return (each * tokens + settings.width * shard) / GIB
