"""Full-parameter fine-tuning of DeepSeek-V3-architecture models on Slurm clusters.

Each subpackage has a README: what it is, where it runs, what it must not import.
``errors``, ``cli``, ``files`` and ``receipts`` use the standard library alone.
"""

__version__ = "0.1.0"
