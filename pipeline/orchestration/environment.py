"""Environment variables that tell a stage's process who started it."""

RUNNER_VARIABLE = "SMALTI_RUNNER_PID"  # set by `smalti run`: its process id
SUBMITTED_VARIABLE = "SMALTI_SUBMITTED"  # set in Slurm's jobs, whose submitter has recorded config and code
