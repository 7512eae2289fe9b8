"""sbatch, squeue or sacct for Snakemake's Slurm plugin: the real command, with patience and a memory of jobs.

slurm_command.py NAME ARGUMENT…    called by workflow/slurm_commands; not meant for people
"""

import sys

import _bootstrap  # noqa: F401

from deepseek_sft.cluster_jobs import commands

if __name__ == "__main__":
    sys.exit(commands.main(sys.argv[1], sys.argv[2:]))
