"""The process of a Slurm job that starts the ranks, and decides what follows when they end.

    __main__.py  one life of a job: preflight, ranks, what ended them, what now
    policy.py    pure: what ended this life and the ones before it -> done, again, or fail with a line
    record.py    the lives of a job in one JSON of the run directory, and how far a stage got
    job.py       this job's calls of scontrol, srun, squeue and sbatch
    alone.py     one at a time, across hosts, for a moment
    ranks.py     srun with a rank per process, and what the first rank that failed said

It runs beside the ranks, outside of their container, on whatever Python 3.9 the node has: so it needs no packages.
"""
