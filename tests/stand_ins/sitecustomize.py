"""A stand-in for the engine's loop: what preflight imports on nodes that have a stand-in for torch."""

import sys
import types

NAME = "deepseek_sft.training.xtuner_engine.loop"
sys.modules[NAME] = types.ModuleType(NAME)
