"""All tokens on the experts of one rank: what the exchange allocates at most, and whether it is exact.

Usage: skew_worker.py RANKS RANKS_PER_NODE ROWS TOKENS OUTPUT, ``workflow`` and ``tests`` on its path; run by train's
Python. ROWS is ``train.exchange_rows``. Rank 0, whose experts all tokens choose, writes JSON to OUTPUT.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import training_ranks

HIDDEN, FFN, HELD, TOP_K = 512, 256, 8, 4


def peak_of(run) -> tuple[int, object]:
    """Most bytes that torch holds in ``run()`` above what it held before, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak, result


def measure(ranks: int, ranks_per_node: int, rows: int, tokens: int, output: Path) -> None:
    """One layer's routed experts, forward and backward, on each rank."""
    import torch.distributed as dist

    from deepseek_sft.model.expert_parallel import ExpertParallel
    from deepseek_sft.model.experts import ExpertShard, MixtureOfExperts

    rank, sizes = (
        dist.get_rank(),
        {"hidden_size": HIDDEN, "moe_intermediate_size": FFN, "n_routed_experts": HELD * ranks},
    )
    config = SimpleNamespace(**sizes, experts_per_shard=HELD, grouped_products=False)
    parallel = ExpertParallel.of_size(ranks, ranks_per_node, rows)
    layer = MixtureOfExperts.__new__(MixtureOfExperts)  # its exchange alone: no router, no shared experts
    torch.nn.Module.__init__(layer)
    layer.parallel, layer.experts_per_shard, layer.kept, layer._order = parallel, HELD, None, None
    layer.routed_experts, layer.grouped = HELD * ranks, False
    layer.experts = torch.nn.ModuleDict({str(rank): ExpertShard(config, HELD, None)})
    (shard,) = layer.experts.values()
    random = torch.Generator().manual_seed(rank)
    for parameter in shard.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=random)
    hidden = torch.randn(tokens, HIDDEN, generator=random, requires_grad=True)
    experts = torch.stack([torch.randperm(HELD, generator=random)[:TOP_K] for _ in range(tokens)])
    weights = torch.rand(tokens, TOP_K, generator=random)
    nothing = hidden.new_zeros(())
    if parallel.nodes is None:
        routed, _ = layer._by_rows(hidden, experts, weights, lambda: nothing)
    else:
        routed, _ = layer._over_nodes(hidden, experts, weights, None, lambda: nothing)
    pulled = torch.randn(routed.shape, generator=random)
    peak, _ = peak_of(lambda: routed.backward(pulled))

    # The same with all experts here.
    w1w3, w2 = (parameter.detach().clone() for parameter in shard.parameters())
    for whole in (w1w3, w2):
        dist.broadcast(whole, 0)
    w1w3, w2, alone = w1w3.requires_grad_(), w2.requires_grad_(), hidden.detach().clone().requires_grad_()
    wanted = torch.zeros_like(alone)
    for expert in range(HELD):
        token, place = (experts == expert).nonzero(as_tuple=True)
        gate, up = (alone[token] @ w1w3[expert].T).chunk(2, dim=1)
        done = (torch.nn.functional.silu(gate) * up) @ w2[expert].T
        wanted = wanted.index_add(0, token, done * weights[token, place, None])
    wanted.backward(pulled)
    found = {"outputs": (routed, wanted), "tokens": (hidden.grad, alone.grad)}
    for name, own, whole in zip(("w1w3", "w2"), shard.parameters(), (w1w3, w2), strict=True):
        dist.all_reduce(whole.grad)
        if rank == 0:
            found[name] = own.grad, whole.grad
    worst = {name: ((one - other).norm() / other.norm()).item() for name, (one, other) in found.items()}
    if rank == 0:
        arrived = ranks * tokens * TOP_K
        output.write_text(json.dumps({"peak": peak, "rows_arrived": arrived, "worst": max(worst.values())}))


def main(ranks: int, ranks_per_node: int, rows: int, tokens: int, output: Path) -> None:
    training_ranks.import_libraries()
    training_ranks.group(ranks, measure, output.with_suffix(".meeting"), ranks, ranks_per_node, rows, tokens, output)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), Path(sys.argv[5]))
