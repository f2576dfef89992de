"""The Slurm path: `smalti submit`, `status`, `logs`, `cancel`, `resubmit`. Knows no torch.

    cluster.py    what a cluster file says: partition, nodes, GPUs, time, set-up lines, per stage
    render.py     stage.sbatch + config + cluster -> one readable job file per stage
    scheduler.py  the calls of sbatch, squeue, sacct and scancel
    submit.py     the graph -> jobs chained by afterok
    status.py     squeue + sacct + run directory -> one table
    preflight.py  is every host fit for a training on several processes? With roll_call.py and device_check.py
    supervisor/   the process of a job that starts the ranks and decides what follows when they end

Requeue: `stop_ahead_s` before its time limit (or when it is preempted) Slurm signals the job, the stage saves a
checkpoint and exits 0 without _SUCCESS, and the supervisor calls `scontrol requeue`; the next life of the job resumes
from the checkpoint. Lives without progress spend a budget (`max_time_limits` and others). docs/slurm.md tells the rest.
The command line is `pipeline/cli/slurm.py`.
"""
