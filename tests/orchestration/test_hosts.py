"""`smalti run --hosts`: trainings on several machines without Slurm, here by an ssh that stays on this one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.orchestration.hosts import Host, ranks_on, read_hosts
from tests.conftest import NO_TRACKING, TINY
from tests.launch import ROOT, environment, launch

STEPS = 100  # long enough to be stopped on the way, and nothing in between that only takes time
OVERRIDES = (
    NO_TRACKING,
    *(f"image_tokenizer.training.{key}={STEPS}" for key in ("steps", "evaluate_every", "log_images_every")),
    f"image_tokenizer.training.checkpoint_every={STEPS}",
)


def _ssh_to_here(folder: Path) -> str:
    """A PATH with an ssh that notes where it should have gone."""
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\necho "$1" >> {folder}/visited\ncd /\nexec sh -c "$2"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def test_a_hostfile_gives_ranks_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# our machines\n\nme@10.0.0.1 slots=2\nnode2\n")
    hosts = read_hosts(tmp_path / "hosts")
    assert hosts == (Host("me@10.0.0.1", 2), Host("node2", 1))
    first, second = ranks_on(hosts)
    assert [(r["RANK"], r["LOCAL_RANK"], r["LOCAL_WORLD_SIZE"]) for r in [*first, *second]] == [
        *(("0", "0", "2"), ("1", "1", "2"), ("2", "0", "1"))
    ]
    assert {(r["MASTER_ADDR"], r["WORLD_SIZE"]) for r in [*first, *second]} == {("10.0.0.1", "3")}


@pytest.mark.parametrize("text", ["", "a slots=0", "a slots=x", "a b", "-oProxyCommand=x slots=1", "a;b slots=1"])
def test_a_line_that_names_no_machine_is_a_mistake(text: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match="slots=PROCESSES"):
        read_hosts(tmp_path / "hosts")


@pytest.mark.slow
def test_ranks_on_two_machines_save_when_the_runner_is_asked_to_stop_and_go_on(tmp_path: Path) -> None:
    """Stopped at some step and run on, the two machines' weights are those of two processes of one machine."""
    run = ["run", str(TINY), f"runs={tmp_path}", *OVERRIDES]
    launch("pipeline", *run, "--only", "prepare")
    shutil.copytree(tmp_path / "tiny", tmp_path / "alone")
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    on_hosts = [*run, "--only", "image-tokenizer", "--hosts", str(tmp_path / "hosts")]
    path = _ssh_to_here(tmp_path)
    stage = tmp_path / "tiny" / "image-tokenizer"
    running = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *on_hosts], env=environment(PATH=path), cwd=ROOT, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not ((stage / "metrics.jsonl").exists() and (stage / "metrics.jsonl").read_text()):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[1].decode()
    assert running.returncode == 75, said
    assert "stopped at step" in said
    assert "resuming from step" in launch("pipeline", *on_hosts, PATH=path)
    assert sorted((tmp_path / "visited").read_text().split()) == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]
    launch("pipeline", *run, "--only", "image-tokenizer", "processes=2", "name=alone")
    weights = [tmp_path / name / "image-tokenizer" / "model" / "model.safetensors" for name in ("tiny", "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
