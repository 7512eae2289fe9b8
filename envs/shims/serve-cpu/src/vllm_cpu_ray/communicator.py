"""Imported by vLLM only, for the communication between a model's ranks."""

import socket

import torch.distributed
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class NodeAwareCpuCommunicator(CpuCommunicator):
    """Uses shared memory only among ranks of one node.

    vLLM 0.32 tells nodes apart by the port of its init method, which is the same everywhere under Ray; ranks on other
    nodes then end with "open shm in SHMManager failed. errno: 2".
    """

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        names: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(names, socket.gethostname(), group=self.device_group)
        return len(set(names)) == 1 and super()._all_group_ranks_share_shm_group_name()
