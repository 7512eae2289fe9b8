"""Imported by vLLM only, once it has chosen this platform."""

from vllm.platforms.cpu import CpuPlatform


class CpuRayPlatform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "vllm_cpu_ray.communicator.NodeAwareCpuCommunicator"
