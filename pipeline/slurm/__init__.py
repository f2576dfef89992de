"""The Slurm path: `smalti submit`, `status`, `logs`, `cancel`, `resubmit`. Knows no torch.

    cluster.py    what a cluster file says: partition, nodes, GPUs, time, set-up lines, per stage
    render.py     stage.sbatch + config + cluster -> one readable job file a stage
    scheduler.py  the calls of sbatch, squeue, sacct and scancel
    submit.py     the graph -> jobs chained by afterok
    status.py     squeue + sacct + run directory -> one table
    commands.py   the command line

How a job stops and comes back is in the job file itself, stage.sbatch. See docs/slurm.md.
"""
