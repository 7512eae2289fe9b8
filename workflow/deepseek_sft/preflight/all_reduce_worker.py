"""One rank of the measurement under load; started by bandwidth.py with torch's usual variables. Prints lines of JSON.

``{"stage": "loaded"}`` once torch is imported, ``{"stage": "joined"}`` once all ranks have met, then what was measured.

Bus bandwidth as NCCL's tests define it: 2 (n − 1) / n × bytes / seconds, comparable over any number of ranks. Where it
is below the floor, all pairs of neighbouring nodes are measured one after the other: a slow node is slow with both.
"""

import argparse
import datetime
import json
import os
import time

import torch
import torch.distributed as dist

from . import device_speed

ROUNDS = {"nccl": 10, "gloo": 3}
MEASURES = ("gemm", "memory_bandwidth", "nvlink", "all_reduce")


def bus_bandwidth(tensor: torch.Tensor, rounds: int, group: dist.ProcessGroup | None = None) -> float:
    """GB/s of the slowest rank of a group."""
    ranks = dist.get_world_size(group)
    _synchronise(tensor)
    dist.all_reduce(tensor, group=group)  # warm up: connections are made here
    _synchronise(tensor)
    started = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor, group=group)
    _synchronise(tensor)
    seconds = torch.tensor([(time.perf_counter() - started) / rounds], device=tensor.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size() / 1e9 / seconds.item()


def is_correct(device: torch.device) -> bool:
    """Whether a sum over ranks is exact: small whole numbers, different at each place, are exact in fp32."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    places = torch.arange(65536, device=device, dtype=torch.float32) % 64
    summed = places * (rank + 1)
    dist.all_reduce(summed)
    right = torch.equal(summed, places * (ranks * (ranks + 1) // 2))
    wrong = torch.tensor([0 if right else 1], device=device)
    dist.all_reduce(wrong)
    return wrong.item() == 0


def pairs(tensor: torch.Tensor, ranks_per_node: int, rounds: int) -> dict[int, float]:
    """Peer node → GB/s, for the pairs of neighbouring nodes that this node is in; all ranks take part in all groups."""
    nodes, own = dist.get_world_size() // ranks_per_node, dist.get_rank() // ranks_per_node
    found = {}
    for first in range(nodes if nodes > 2 else 1):
        second = (first + 1) % nodes
        members = [node * ranks_per_node + i for node in sorted((first, second)) for i in range(ranks_per_node)]
        group = dist.new_group(members)
        if own in (first, second):
            found[first if own == second else second] = bus_bandwidth(tensor, rounds, group)
        dist.barrier()
    return found


def inside_the_node(tensor: torch.Tensor, ranks_per_node: int, rounds: int) -> float:
    """GB/s over the ranks of one node alone, all nodes at the same time: NVLink on GPUs."""
    own = dist.get_rank() // ranks_per_node
    groups = [
        dist.new_group(list(range(node * ranks_per_node, (node + 1) * ranks_per_node)))
        for node in range(dist.get_world_size() // ranks_per_node)
    ]
    dist.barrier()
    found = bus_bandwidth(tensor, rounds, groups[own])
    dist.barrier()
    return found


def _synchronise(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Everything asked for, in an order in which nothing runs beside what is measured."""
    wanted, rounds, facts = set(options.measure), ROUNDS[options.backend], {"ranks": dist.get_world_size()}
    if "gemm" in wanted:
        dist.barrier()
        facts["gemm_tflops"] = device_speed.gemm_tflops(device)
    if "memory_bandwidth" in wanted:
        dist.barrier()
        threads = device_speed.threads_of(options.ranks_per_node)
        facts["memory_gb_per_second"] = device_speed.memory_gb_per_second(device.type, threads)
    tensor = torch.zeros(max(1, int(options.megabytes * 1e6) // 4), device=device)
    if "nvlink" in wanted and options.ranks_per_node > 1:
        facts["nvlink_gb_per_second"] = inside_the_node(tensor, options.ranks_per_node, rounds)
    if "all_reduce" in wanted and dist.get_world_size() > 1:
        facts["correct"] = is_correct(device)
        speed = facts["gb_per_second"] = bus_bandwidth(tensor, rounds)
        if options.floor is not None and not speed >= options.floor and facts["ranks"] > options.ranks_per_node:
            facts["pairs"] = pairs(tensor, options.ranks_per_node, rounds)
    dist.barrier()
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("nccl", "gloo"), required=True)
    parser.add_argument("--megabytes", type=float, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--measure", nargs="+", choices=MEASURES, required=True)
    parser.add_argument("--join-seconds", type=float, required=True, help="longest wait for the other ranks' imports")
    parser.add_argument("--seconds", type=float, required=True, help="longest wait in a collective after that")
    parser.add_argument("--floor", type=float, help="GB/s below which pairs of nodes are measured")
    options = parser.parse_args()
    print(json.dumps({"stage": "loaded"}), flush=True)  # from here on the clock runs
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if options.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # In the store as in collectives the longest wait is for ranks that still import torch.
    timeout = datetime.timedelta(seconds=max(options.join_seconds, options.seconds))
    dist.init_process_group(options.backend, timeout=timeout)
    dist.barrier()
    print(json.dumps({"stage": "joined"}), flush=True)
    facts = measure(options, device)
    dist.destroy_process_group()
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
