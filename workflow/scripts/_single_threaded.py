"""Keeps numpy from starting threads that a script has no use for, so that its worker processes can be forked.

Imported before anything that imports numpy; see ``deepseek_sft.data.parallel``.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
