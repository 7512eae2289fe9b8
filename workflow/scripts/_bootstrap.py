"""Makes ``deepseek_sft`` importable for scripts run from a checkout, in whichever environment runs them.

Environments are shared between checkouts, so the library is not installed into them. A Python that lacks what a script
needs (no environment activated) says which one to use.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek_sft import interpreter

interpreter.guard()
