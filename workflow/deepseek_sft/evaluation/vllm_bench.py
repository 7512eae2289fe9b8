"""vLLM's own command line, several times in one process: importing vLLM takes longer than measuring a small model.

``python -m deepseek_sft.evaluation.vllm_bench RUNS``, where RUNS is a JSON list of argument lists. The first run that
fails ends it, with its exit code.
"""

import importlib.metadata
import sys
from pathlib import Path

from .. import json_files


def entry_point() -> importlib.metadata.EntryPoint | None:
    """The program ``vllm`` of the environment that runs this; None where it is not installed."""
    return next(iter(importlib.metadata.entry_points(group="console_scripts", name="vllm")), None)


def main(runs: Path) -> int:
    """Run all; the exit code of the first that fails, else 0."""
    program = entry_point()
    if not program:
        sys.exit("no program `vllm` is installed")
    run = program.load()
    for arguments in json_files.load(runs, list):
        print("== vllm", *arguments, flush=True)
        sys.argv = ["vllm", *arguments]
        try:
            code = run()
        except SystemExit as ended:  # how programs of argparse end, well or badly
            code = ended.code
        if code:
            return code if isinstance(code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
