"""Our reduce-scatter, gathers and hooks of ZeRO-3 against DeepSpeed's own, on three real ranks; prints JSON.

Usage: zero_calls_probe.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import training_ranks

RANKS = 3
SIZES = ([1], [2], [3], [7, 1, 12], [30], [5, 64, 2, 9], [8, 8])  # fewer elements than ranks, uneven, even


def compare(folder: Path) -> None:
    """On each rank: the same tensors through both."""
    import deepspeed
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    from deepseek_sft.training.xtuner_engine import zero_calls

    rank, differences = torch.distributed.get_rank(), []
    group = torch.distributed.group.WORLD
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in SIZES:
            generator = torch.Generator().manual_seed(rank)
            tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
            own = reduce_scatter_coalesced([tensor.clone() for tensor in tensors], group)
            ours = zero_calls.reduce_scatter([tensor.clone() for tensor in tensors], group)
            if not all(torch.equal(one, other) for one, other in zip(own, ours, strict=True)):
                differences.append(f"{dtype} {sizes}")
    gathered = []
    for alone in (1, 50, 1 << 24):  # each by itself, some together, all together
        zero_calls.ALONE = alone
        gathered.append(gathers_alike(deepspeed, zero_calls))
    figures = {"reduced differently": differences, "gathered alike": gathered}
    (folder / f"rank{rank}.json").write_text(json.dumps(figures))


def gathers_alike(deepspeed, zero_calls) -> bool:
    """Parameters gathered by DeepSpeed's own way and by ours, and again after they were let go."""
    with deepspeed.zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3}, "train_batch_size": RANKS}):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 11), torch.nn.LayerNorm(11))
    parameters = list(model.parameters())
    handle = parameters[0].all_gather_coalesced(parameters)
    handle.wait()
    expected = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.partition()
    assert zero_calls.install(model)
    for _ in range(2):
        handle = parameters[0].all_gather_coalesced(parameters)
        handle.wait()
        parameters[0].partition()
        handle.wait()  # DeepSpeed waits once for each parameter: what was let go meanwhile stays away
        if parameters[0].ds_status.name != "NOT_AVAILABLE":
            return False
        if not all(torch.equal(p.data, one) for p, one in zip(parameters[1:], expected[1:], strict=True)):
            return False
        for parameter in parameters[1:]:
            parameter.partition()
    return True


class Bare(torch.nn.Module):
    """Of no parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(rows)))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(12))
        self.norm, self.inner = torch.nn.LayerNorm(12), Bare()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        def layer(rows: torch.Tensor) -> torch.Tensor:
            return rows + self.scale * self.inner(self.norm(rows))

        return torch.utils.checkpoint.checkpoint(layer, rows, use_reentrant=True)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = torch.nn.ModuleList(Block() for _ in range(5)), torch.nn.Linear(12, 4)

    def forward(self, rows: torch.Tensor, without: int | None = None) -> torch.Tensor:
        """Args: without: block that is left out."""
        for number, block in enumerate(self.blocks):
            if number != without:
                rows = block(rows)
        return self.last(rows)


def train(folder: Path, lean: bool, frozen: str | None) -> None:
    """Six steps of two micro batches: what was gathered when, losses, and this rank's weights at the end.

    Before three of them something is evaluated: before anything is learnt, before a micro batch has been seen whole in
    the learnt order, and later. In one a block is left out, and the order is learnt anew.

    Args:
        lean: with our hooks, else with DeepSpeed's.
        frozen: in the names of parameters that are not trained.
    """
    import deepspeed

    from deepseek_sft.training.xtuner_engine import evaluating, lean_gradients, lean_modules, zero_calls

    torch.manual_seed(3)
    model = Model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = frozen is None or frozen not in name
    zero = {"stage": 3, "stage3_param_persistence_threshold": 4, "stage3_prefetch_bucket_size": 400}
    zero |= {"stage3_max_live_parameters": 1500, "stage3_max_reuse_distance": 300, "reduce_bucket_size": 300}
    zero |= {"contiguous_gradients": not lean}
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "zero_optimization": zero}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    assert zero_calls.install(engine.module)
    if lean:
        assert lean_modules.install(engine.optimizer)
    parameters, gathers, losses = list(engine.module.parameters()), [], []
    first = min(parameter.ds_id for parameter in parameters)

    def logged(asked, **options):
        gathers.append(sorted(parameter.ds_id - first for parameter in asked))
        return zero_calls.gather(asked, **options)

    for parameter in parameters:
        parameter.all_gather_coalesced = logged
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    repeated = []
    for number in range(12):
        rows = torch.randn(3, 12, generator=generator).requires_grad_()
        if number in (0, 2, 6):
            with evaluating.evaluating(engine):
                losses += [engine(rows).square().mean().item() for _ in range(2)]
        loss = engine(rows, without=3 if number == 7 else None).square().mean()
        engine.backward(loss)
        repeated.append(getattr(engine.optimizer.parameter_offload.get_param_coordinator(), "repeating", False))
        engine.step()
        losses.append(loss.item())
    if lean:
        assert type(engine.optimizer) is lean_gradients.DeepSpeedZeroOptimizer_Stage3
    rank, weights = torch.distributed.get_rank(), []
    for parameter in parameters:  # without what pads the last rank's part, which is anything
        part = parameter.ds_tensor.ds_numel
        weights.append(parameter.ds_tensor.view(-1)[: max(0, parameter.ds_numel - rank * part)].tolist())
    figures = {"gathers": gathers, "losses": losses, "weights": weights, "repeated": repeated}
    (folder / f"{frozen}{lean}{rank}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    os.environ["DS_ACCELERATOR"] = "cpu"
    training_ranks.import_libraries()
    training_ranks.group(RANKS, compare, out / "meeting", out)
    for variant in range(4):
        lean, frozen = variant % 2 == 1, (None, "norm")[variant // 2]
        training_ranks.group(RANKS, train, out / f"meeting{variant}", out, lean, frozen)
    figures = [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]
    for rank, found in enumerate(figures):
        for name, frozen in (("trained alike", None), ("trained alike with a frozen norm", "norm")):
            own, ours = (json.loads((out / f"{frozen}{lean}{rank}.json").read_text()) for lean in (False, True))
            repeated = [number for number, done in enumerate(ours.pop("repeated")) if done]
            own.pop("repeated")
            found |= {name: own == ours, f"gathers, {name}": len(ours["gathers"]), f"repeated, {name}": repeated}
    print(json.dumps(figures))
