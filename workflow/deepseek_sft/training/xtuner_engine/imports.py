"""Import everything that this engine's ranks import, and nothing else: what fails says so before a node is asked for.

python -m deepseek_sft.training.xtuner_engine.imports cuda [MODULE …]
"""

import importlib
import sys

from . import compat


def main(accelerator: str, more: list[str]) -> None:
    compat.install(accelerator)
    importlib.import_module("deepseek_sft.training.xtuner_engine.loop")
    for module in more:
        importlib.import_module(module)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
