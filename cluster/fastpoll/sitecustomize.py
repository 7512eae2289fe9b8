"""For demo and tests only: Snakemake's Slurm executor asks for the jobs' status twice a second.

Its own interval (1 s, 11 s, 21 s, … up to 180 s after each look that found nothing finished) spares the controller of
a real cluster, is not configurable, and makes a chain of short jobs twice as long. PYTHONPATH=cluster/fastpoll switches
this on: Python imports a module of this file's name when it starts. Every other program, and Snakemake without that
executor, is left as it is.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

EXECUTOR = "snakemake_executor_plugin_slurm"
SECONDS = 0.5


def poll_fast(module):
    """Fix the interval; the executor's own attempts to raise it have no effect."""
    fixed = property(lambda self: SECONDS, lambda self, value: None)
    if hasattr(getattr(module, "Executor", None), "next_seconds_between_status_checks"):
        module.Executor.next_seconds_between_status_checks = fixed
    else:
        print(f"fastpoll: {EXECUTOR} has changed, its status interval stays as it is", file=sys.stderr)


class PatchedLoader(importlib.abc.Loader):
    """Another loader, followed by ``poll_fast``."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        poll_fast(module)


class ExecutorFinder(importlib.abc.MetaPathFinder):
    """Finds one module where everybody else finds it, and wraps its loader."""

    def find_spec(self, name, path=None, target=None):
        if name != EXECUTOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = PatchedLoader(spec.loader)
        return spec


def run_hidden_sitecustomize():
    """Run the sitecustomize module that this one hides: distributions and coverage tools have theirs."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, ExecutorFinder())
run_hidden_sitecustomize()
