"""The wheel alone is enough: every command works in a folder that has nothing of the source tree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.conftest import NO_TRACKING, STAGE_NAMES, TINY
from tests.launch import ROOT, environment

pytestmark = pytest.mark.slow
PACKAGES = ("pipeline", "stages")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a folder `build` in the source tree, and would find it there again."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    _call([sys.executable, "-m", "pip", *build], cwd=target)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's own repository: the wheel in its .venv, and modules that have the names of ours."""
    folder = tmp_path_factory.mktemp("elsewhere")
    _call([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=folder)
    python = folder / ".venv" / "bin" / "python"
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    _call([sys.executable, "-m", "pip", *install], cwd=folder)
    # What the wheel depends on comes from here; the source tree, which an editable install put here, does not.
    found = _call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder)
    (Path(found.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in PACKAGES:
        (folder / f"{name}.py").write_text("raise SystemExit('a module of somebody else')\n")
    shutil.copy(TINY, folder)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "theirs"]
    for arguments in (["init", "--quiet"], ["add", "*.py"], commit):
        _call(["git", *arguments], cwd=folder)
    return folder


def _call(command: list[str], cwd: Path, check: bool = True) -> str:
    clean = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr


def _smalti(folder: Path, *arguments: str) -> str:
    return _call([str(folder / ".venv" / "bin" / "smalti"), *arguments], cwd=folder)


@pytest.fixture(scope="module")
def run(elsewhere: Path) -> Path:
    """The run directory of `smalti run tiny.yaml` there."""
    short = ("image_tokenizer.training.steps=6", "transformer.training.steps=6")
    _smalti(elsewhere, "run", "tiny.yaml", NO_TRACKING, *short)
    return elsewhere / "runs" / "tiny"


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    files = {path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    wanted = {str(file) for file in files if "__pycache__" not in file.parts}
    assert not wanted - set(zipfile.ZipFile(wheel).namelist())
    assert {"pipeline/py.typed", "pipeline/slurm/stage.sbatch", "pipeline/report/template.html"} <= wanted


def test_run_finishes_every_stage(run: Path) -> None:
    assert all((run / stage / "_SUCCESS").exists() for stage in STAGE_NAMES)
    assert (run / "report" / "index.html").exists()


def test_a_stage_alone_is_up_to_date(run: Path) -> None:
    assert "report: up to date" in _smalti(run.parents[1], "report", "--config", "runs/tiny/config.yaml")


def test_nothing_of_the_surrounding_repository_is_recorded(run: Path) -> None:
    version = json.loads((run / "code" / "version.json").read_text())
    assert (version["commit"], version["changed"]) == (None, False)
    assert (run / "code" / "uncommitted.patch").read_text() == ""


def test_submit_writes_job_files_that_run_a_copy_of_the_installed_code(elsewhere: Path) -> None:
    (elsewhere / "cluster.yaml").write_text("{}")
    output = _smalti(elsewhere, "submit", "tiny.yaml", "name=queued", "--cluster", "cluster.yaml", "--dry-run")
    assert output.count("written: ") == len(STAGE_NAMES)
    code = elsewhere / "runs" / "queued" / "code" / "src"
    job = elsewhere / "runs" / "queued" / "slurm" / "dry-run" / "transformer.sbatch"
    assert f"code={code}\n" in job.read_text()
    python = elsewhere / ".venv" / "bin" / "python"
    copy = "import sys; from pathlib import Path; from pipeline.orchestration.code_snapshot import copy_packages;"
    _call([str(python), "-c", f"{copy} copy_packages(Path(sys.argv[1]))", str(code)], cwd=code.parents[1])
    assert sorted(path.name for path in code.iterdir()) == list(PACKAGES)
    there = "import pipeline, stages.report; print(pipeline.__file__)"
    copied = _call(["env", f"PYTHONPATH={code}", "PYTHONSAFEPATH=1", str(python), "-c", there], cwd=elsewhere)
    assert copied.strip() == str(code / "pipeline" / "__init__.py")


def test_plan_generate_and_export_work(run: Path) -> None:
    folder = run.parents[1]
    assert "tiny: 2 layers" in _smalti(folder, "plan", "tiny.yaml")
    _smalti(folder, "generate", "runs/tiny", "joker", "-o", "joker.png")
    _smalti(folder, "export", "runs/tiny", "exported")
    _smalti(folder, "generate", "exported", "joker", "-o", "again.png")
    assert (folder / "joker.png").stat().st_size > 100
    assert (folder / "again.png").exists()
    assert (folder / "exported" / "README.md").exists()
