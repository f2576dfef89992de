"""Where a site's Python comes from: job files keep what `setup` made, containers are built from the constraints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.orchestration.graph import stage_named
from pipeline.slurm.cluster import load_cluster
from pipeline.slurm.render import JobFile, render
from tests.launch import ROOT
from tests.slurm.conftest import assert_clean


def _job_file(cluster: Path, run: Path) -> str:
    loaded, stage = load_cluster(cluster), stage_named("transformer")
    return render(JobFile(stage, loaded.resources(stage)), loaded, run, ROOT, run)


def test_what_setup_put_on_pythonpath_stays_there_behind_the_runs_own_code(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{setup: ['export PYTHONPATH=/of/a/module'], supervisor_python: /usr/bin/env}")
    job = _job_file(tmp_path / "c.yaml", tmp_path)
    job = re.sub(r'exec /usr/bin/env "\$code/.*', "exec printenv PYTHONPATH", job, flags=re.DOTALL)
    clean = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho a\n")
    (tmp_path / "scontrol").chmod(0o755)
    clean["PATH"] = f"{tmp_path}:{clean['PATH']}"
    done = subprocess.run(["bash", "-c", job], env=clean, capture_output=True, text=True)
    assert done.stdout == f"{ROOT}:/of/a/module\n"


def test_the_ranks_of_a_restarted_job_meet_on_another_port_than_those_of_the_life_before(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("{supervisor_python: /usr/bin/env}")
    job = re.sub(
        r'exec /usr/bin/env "\$code/.*',
        "exec printenv MASTER_PORT",
        _job_file(tmp_path / "c.yaml", tmp_path),
        flags=re.DOTALL,
    )
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho a\n")
    (tmp_path / "scontrol").chmod(0o755)
    of_job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "a"}
    ports = [
        int(subprocess.run(["bash", "-c", job], env=of_job | restarted, capture_output=True, text=True).stdout)
        for restarted in ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "2"})
    ]
    assert ports[0] == 10_000 + 41_234 % 20_000
    assert len(set(ports)) == 3
    assert all(10_000 <= port < 30_000 for port in ports)


SITE = """
module() { [[ $1 != load ]] || export LOADED="${*:2}" PYTHONPATH=/of/a/module; }
"""
MODULES_PATH = "{code}:{home}/smalti-packages:/of/a/module"
CONDA = """#!/bin/sh
echo 'conda() { export CONDA_DEFAULT_ENV=$2; : "$CONDA_UNSET_BEFORE"; }'
"""


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("modules", {"LOADED": "Python/3.12.3 PyTorch/2.8.0 CUDA/12.6", "PYTHONPATH": MODULES_PATH}),
        ("conda", {"CONDA_DEFAULT_ENV": "smalti", "PYTHONPATH": "{code}"}),
        ("venv", {"NCCL_SOCKET_IFNAME": "ib0", "PYTHONPATH": "{code}"}),
        ("apptainer", {"PYTHONPATH": "{code}"}),
        ("pyxis", {"PYTHONPATH": "{code}"}),
    ],
)
def test_the_setup_of_each_example_runs_and_reaches_the_supervisor(
    example: str, expected: dict[str, str], tmp_path: Path
) -> None:
    conda, scontrol, site = tmp_path / "miniforge3/bin/conda", tmp_path / "scontrol", tmp_path / "site.sh"
    conda.parent.mkdir(parents=True)
    for path, text in ((conda, CONDA), (scontrol, "#!/bin/sh\necho a\n"), (site, SITE)):
        path.write_text(text)
        path.chmod(0o755)
    job = _job_file(ROOT / "configs" / "cluster" / f"{example}.yaml", tmp_path)
    job = re.sub(r'exec \S+ "\$code/.*', "exec env", job, flags=re.DOTALL)
    clean = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "BASH_ENV": str(site)}
    clean |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    done = subprocess.run(["bash", "-c", job], env=clean, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {n: found.get(n) for n in expected} == {
        n: text.format(code=ROOT, home=tmp_path) for n, text in expected.items()
    }


def test_a_conda_that_uses_unset_variables_does_not_end_the_job(tmp_path: Path) -> None:
    job = _job_file(ROOT / "configs" / "cluster" / "conda.yaml", tmp_path)
    assert "set -" not in job[: job.index("conda activate")]


def test_the_supervisor_of_a_container_is_outside_of_it_and_the_ranks_are_inside(tmp_path: Path) -> None:
    job = _job_file(ROOT / "configs" / "cluster" / "apptainer.yaml", tmp_path)
    assert '\nexec /usr/bin/python3 "$code/pipeline/slurm/supervisor" ' in job
    assert "--python 'apptainer exec --nv --bind /scratch /shared/me/smalti.sif python3'" in job
    job = _job_file(ROOT / "configs" / "cluster" / "pyxis.yaml", tmp_path)
    assert "--srun 'srun --label --cpus-per-task=8 --container-image=/shared/me/smalti.sqsh " in job
    (tmp_path / "c.yaml").write_text("launcher: [apptainer, exec, a.sif]")
    assert "\nexec python3 " in _job_file(tmp_path / "c.yaml", tmp_path)
    (tmp_path / "c.yaml").write_text("{}")
    assert f"\nexec {sys.executable} " in _job_file(tmp_path / "c.yaml", tmp_path)


def test_the_supervisor_needs_no_packages() -> None:
    supervisor = ROOT / "pipeline" / "slurm" / "supervisor"
    # -S: no site-packages.
    done = subprocess.run(
        [sys.executable, "-S", supervisor, "--help"], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--max-crashes" in done.stdout


def test_the_command_for_a_newer_slurm_is_clean() -> None:
    assert_clean([ROOT / "slurm" / "on-debian"])


@pytest.mark.parametrize("recipe", ["smalti.def", "Dockerfile"])
def test_a_container_is_built_from_the_constraints_and_from_files_that_exist(recipe: str) -> None:
    text = (ROOT / "slurm" / recipe).read_text()
    assert "pip install --no-cache-dir --constraint constraints.txt '.[demo,data]'" in text
    if recipe == "Dockerfile":
        copied = {name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()}
    else:
        copied = set(re.findall(r"^    (\S+) /opt/smalti/\1$", text, re.MULTILINE))
        script = re.search(r"%post\n(.*?)\n%", text, re.DOTALL)
        assert script
        shellcheck = Path(sys.executable).parent / "shellcheck"
        subprocess.run([shellcheck, "--shell=sh", "-"], input=script[1], text=True, check=True)
    assert {"pyproject.toml", "constraints.txt", "README.md", "pipeline", "stages"} <= copied
    assert all((ROOT / name).exists() for name in copied)
