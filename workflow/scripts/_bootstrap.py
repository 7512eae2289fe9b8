"""Makes ``deepseek_sft`` importable for scripts run from a checkout, in whichever environment runs them.

Environments are shared between checkouts, so the library is not installed into them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
