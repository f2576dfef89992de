"""`smalti doctor` names what is wrong, each thing in a line of its own, and nothing where all is well."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pipeline.doctor.machine import gpus
from pipeline.slurm.cluster import seconds
from tests.conftest import TINY
from tests.launch import environment

Lines = dict[str, tuple[str, str]]  # by name: level and text


def consult(folder: Path, *arguments: str, files: int | None = None, **extra: str) -> tuple[int, Lines]:
    """Exit code and lines of the doctor, started in `folder`."""
    limit = partial(resource.setrlimit, resource.RLIMIT_NOFILE, (files, files)) if files else None
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor", *arguments],
        env=environment(**extra), cwd=folder, capture_output=True, text=True, preexec_fn=limit,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    rows = [(line[:4].strip(), line[6:30].strip(), line[30:].strip()) for line in done.stdout.splitlines()]
    return done.returncode, {name: (level, text) for level, name, text in rows}


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def plant(folder: Path, name: str, version: str) -> None:
    """Let an older version of a distribution be found first."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.slow
def test_thirteen_planted_faults_are_each_named(tmp_path: Path) -> None:
    packages, programs = tmp_path / "packages", tmp_path / "programs"
    plant(packages, "numpy", "1.0")
    plant(packages, "pyarrow", "1.0")
    (packages / "webdataset.py").write_text("raise ImportError('libtar.so.0: no such file')")
    executable(programs / "nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("partition: gpu\n")
    path = os.pathsep.join([str(packages), environment()["PYTHONPATH"]])
    changes = ["runs=/proc/x", "tracking.uri=http://127.0.0.1:9", "evaluate.extractor=inception-v3"]
    code, lines = consult(
        tmp_path, str(TINY), *changes, "--cluster", str(cluster), files=512, PYTHONPATH=path, PATH=str(programs),
        NVIDIA_TF32_OVERRIDE="1", GLOO_SOCKET_IFNAME="nosuch0", HOME=str(tmp_path), TORCH_HOME=str(tmp_path),
    )  # fmt: skip
    told = {
        "packages": ("FAIL", "expected numpy<3,>=2, found 1.0"),
        "imports": ("FAIL", "expected to import webdataset, found: libtar.so.0"),
        "extra data": ("note", "missing pyarrow"),
        "environment": ("FAIL", "`unset NVIDIA_TF32_OVERRIDE`"),
        "open files": ("warn", "found 512"),
        "compiler": ("note", "no C++ compiler (g++, clang++, or $CXX)"),
        "gpus": ("FAIL", "the driver shows 1 GPU, but this torch is built for CPUs"),
        "network": ("FAIL", "no interface nosuch0 here"),
        "disk": ("FAIL", "expected to write in /proc"),
        "slurm": ("FAIL", "no sbatch on this machine"),
        "weights inception-v3": ("FAIL", "no weights at"),
        "run directory": ("FAIL", "expected a place to write to"),
        "mlflow": ("FAIL", "expected a store that answers at http://127.0.0.1:9"),
    }
    assert {n: lines.get(n) for n, (level, text) in told.items() if not _says(lines, n, level, text)} == {}
    assert code == 1


@pytest.mark.slow
def test_a_wrong_clock_and_a_mistake_in_the_config_are_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 60\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    code, lines = consult(tmp_path, str(TINY), "transformer.layer=3", PYTHONPATH=path)
    assert _says(lines, "config", "FAIL", "layer")
    assert _says(lines, "clock", "FAIL", "+60 s off")
    assert "mlflow" not in lines  # without a config there is no store to ask
    assert code == 1


@pytest.mark.slow
def test_where_all_is_well_nothing_fails_and_nothing_is_left_behind(tmp_path: Path) -> None:
    code, lines = consult(tmp_path, str(TINY))
    assert {name: line for name, line in lines.items() if line[0] == "FAIL"} == {}
    assert {"python", "versions", "network", "disk", "locks", "clock", "stages", "run directory", "mlflow"} <= {*lines}
    assert code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("prepare.validation_fraction=0", "prepare.validation_fraction: expected more than 0"),
        ("transformer.init_from=nowhere", "nowhere"),
    ],
)
def test_what_a_run_refuses_before_it_starts_is_named(override: str, complaint: str, tmp_path: Path) -> None:
    code, lines = consult(tmp_path, str(TINY), override)
    assert _says(lines, "stages", "FAIL", complaint)
    assert code == 1


@pytest.mark.parametrize("has_bf16", [True, False])
def test_processors_that_train_in_float32_for_bf16_are_said(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pipeline.doctor.machine._nvidia_smi", str)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: has_bf16)
    [found] = gpus()
    assert ("training.precision bf16 is fp32 here" in found.text) is not has_bf16


@pytest.mark.parametrize(
    ("time", "expected"),
    [("30", 1800), ("04:00:00", 14400), ("10:30", 630), ("2-00:00:00", 172800), ("1-12", 129600)],
)
def test_times_are_read_as_slurm_writes_them(time: str, expected: float) -> None:
    assert seconds(time) == expected
    assert seconds("UNLIMITED") == float("inf")


def _says(lines: Lines, name: str, level: str, text: str) -> bool:
    found = lines.get(name, ("", ""))
    return found[0] == level and text in found[1]
