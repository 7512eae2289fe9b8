"""A vLLM platform plugin: the CPU platform with a name for Ray's resource.

``vllm --version`` asks importlib for the distribution ``vllm``, which the CPU wheel does not carry under that name:
this distribution answers. vLLM's CPU platform has an empty ``ray_device_key``, so its Ray executor stops with
"current platform cpu does not support ray"; counting one Ray "GPU" for each CPU worker runs the same executor code.
"""


def register() -> str:
    """Entry point ``vllm.platform_plugins``: the class to use as the current platform."""
    return "vllm_cpu_ray.platform.CpuRayPlatform"
