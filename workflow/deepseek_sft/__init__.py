"""Full-parameter fine-tuning of DeepSeek-V3-architecture models on Slurm clusters.

Each subpackage belongs to one stage and imports only what that stage's environment holds.
The modules at this level (``errors``, ``cli``, ``files``, ``receipts``) use the standard library alone.
"""

__version__ = "0.1.0"
