"""The Slurm path: `smalti submit`, `status`, `logs`, `cancel`, `resubmit`. Knows no torch.

    cluster.py    what a cluster file says: partition, nodes, GPUs, time, set-up lines, per stage
    render.py     stage.sbatch + config + cluster -> one readable job file per stage
    scheduler.py  the calls of sbatch, squeue, sacct and scancel
    submit.py     the graph -> jobs chained by afterok
    status.py     squeue + sacct + run directory -> one table
    preflight.py  is every host fit for a training on several processes?

The command line is `pipeline/cli/slurm.py`. How a job stops and requeues itself is in the job file, stage.sbatch.
See docs/slurm.md.
"""
