"""Slurm jobs of one experiment over the life of several Snakemakes: found again, waited for, retried or not, cancelled.

``queue``     asking Slurm with patience, and reading what sbatch prints
``holders``   whether the process that left a file still lives
``record``    what a running Snakemake notes: itself, and the jobs it waits for
``commands``  what stands between Snakemake's Slurm plugin and sbatch, squeue, sacct (workflow/slurm_commands)
``start``     what a Snakemake does when it starts and when it ends
``retries``   whether a failed job is tried again
``stop``      the target ``stop``
"""
