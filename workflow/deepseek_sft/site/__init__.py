"""What a Slurm site allows, asked before anything is submitted, so that no job waits that can never start.

``start_check``       every job to submit, at the start
``notation``          Slurm's notations: times, generic resources, host lists, tables
``answers``           what the site's Slurm says of itself: partitions, nodes, reservations, accounts, QOS
``partition_limits``  what of a wanted allocation partitions, nodes, reservations forbid
``accounts``          what accounts and QOS forbid
``questions``         the questions, in bounded time
"""
