"""One job file per stage, from the template `stage.sbatch`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pipeline.core.errors import UserError
from pipeline.orchestration.graph import Stage
from pipeline.slurm.cluster import ClusterConfig, Resources

TEMPLATE = Path(__file__).with_name("stage.sbatch")


@dataclass(frozen=True)
class JobFile:
    """One job file. `array_tasks`: the size of its array; None for a stage as one job, or the join of an array."""

    stage: Stage
    resources: Resources
    array_tasks: int | None = None

    @property
    def name(self) -> str:
        return f"{self.stage.name}.tasks" if self.array_tasks else self.stage.name


def render(job: JobFile, cluster: ClusterConfig, run_directory: Path, code: Path, working_directory: Path) -> str:
    """The text of the job file. All paths are absolute."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"sh": lambda value: shlex.quote(str(value)), "directive": _directive}
    log = "%A_%a" if job.array_tasks else "%j"
    text: str = environment.from_string(TEMPLATE.read_text()).render(
        what=f"Stage {job.stage.name}" + (f" ({job.array_tasks} array tasks)" if job.array_tasks else ""),
        stage=job.stage,
        resources=job.resources,
        array_tasks=job.array_tasks,
        cluster=cluster,
        run_directory=run_directory,
        code=code,
        working_directory=working_directory,
        script=shlex.quote(str(script_path(job, run_directory))),
        job_name=f"{run_directory.name}-{job.name}",
        comment=comment(job, run_directory),
        log_pattern=f"{_percent(run_directory)}/logs/slurm/{job.stage.name}-{log}.log",
        options=_options(job.resources),
        preflight=_preflight(job, cluster),
        srun=shlex.join(
            # srun does not take the CPUs from sbatch by itself.
            ["srun", "--label", f"--cpus-per-task={job.resources.cpus_per_task}", *(job.resources.srun_flags or ())]
        ),
        python=shlex.join([*(job.resources.launcher or ()), job.resources.python or "python3"]),
        supervisor_python=_supervisor_python(job.resources, cluster),
        max_crashes=cluster.max_task_retries if job.array_tasks else cluster.max_crashes,
    )
    return text


def script_path(job: JobFile, run_directory: Path) -> Path:
    return run_directory / "slurm" / f"{job.name}.sbatch"


def comment(job: JobFile, run_directory: Path) -> str:
    """The mark of this run's jobs, kept by Slurm itself, so that no file of ours can disagree with it.

    A site's own comment stands before it: some sites demand one.
    """
    own = job.resources.comment
    return (f"{own}; " if own else "") + f"smalti:{job.name}:{run_directory}"


def _options(resources: Resources) -> list[str]:
    gpu = f"gpu:{resources.gpu_type}" if resources.gpu_type else "gpu"
    chosen = {
        "--partition": resources.partition,
        "--account": resources.account,
        "--qos": resources.qos,
        "--time": resources.time,
        "--nodes": resources.nodes,
        "--ntasks-per-node": resources.ntasks_per_node,
        "--cpus-per-task": resources.cpus_per_task,
        "--gres": f"{gpu}:{resources.gpus}" if resources.gpus else None,
        "--mem": resources.memory,
    }
    return [f"{name}={value}" for name, value in chosen.items() if value is not None] + [
        flag for flag in resources.flags if not flag.startswith("--comment=")
    ]


def _preflight(job: JobFile, cluster: ClusterConfig) -> str | None:
    """The options of this job's preflight; None: without one."""
    wanted = cluster.preflight == "always" or (cluster.preflight == "several" and job.resources.world_size > 1)
    if not wanted:
        return None
    return f"--min-free-gb {cluster.min_free_gb} --timeout-s {cluster.preflight_timeout_s}"


def _supervisor_python(resources: Resources, cluster: ClusterConfig) -> str:
    in_container = resources.launcher or any(flag.startswith("--container") for flag in resources.srun_flags or ())
    return cluster.supervisor_python or ("python3" if in_container else resources.python) or "python3"


def _directive(value: object) -> str:
    """A value for an #SBATCH line, where sbatch understands double quotes and no escapes that we could use."""
    text = str(value)
    if any(character in text for character in '"\n\\'):
        raise UserError(f"expected a path that an #SBATCH line can hold, found {text!r}: rename the folder")
    return f'"{text}"' if " " in text or "'" in text or "#" in text else text


def _percent(path: Path) -> str:
    return str(path).replace("%", "%%")
