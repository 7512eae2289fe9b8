"""Wait until Ray counts a number of living nodes: ``python -m deepseek_sft.serving.ray_nodes ADDRESS COUNT``.

A process of its own, so that the program that watches everything never becomes a Ray driver. It has no deadline; its
caller has.
"""

import sys
import time

import ray


def main(address: str, count: int) -> None:
    """Return once ``count`` nodes are alive; prints their addresses whenever they change."""
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    seen: list[str] = []
    while len(seen) < count:
        alive = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        if alive != seen:
            seen = alive
            print(f"Ray counts {len(seen)} of {count} nodes: {', '.join(seen)}", flush=True)
        time.sleep(0.5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
