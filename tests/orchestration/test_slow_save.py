"""A `smalti run` that is asked to stop waits until its processes have saved, however slow the disk is."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import NO_TRACKING, TINY
from tests.launch import ROOT, environment

# Longer than torchrun leaves its processes after a signal, and `side_by_side.GRACE_S` those whose peer has failed.
SLOW_S = 31
SLOW_DISK = f"""
import os, time
sync, slept = os.fsync, []
def slow(file):
    if not slept and "/checkpoints/" in os.readlink(f"/proc/self/fd/{{file}}"):
        slept.append(True)
        time.sleep({SLOW_S})
    sync(file)
os.fsync = slow
"""
ENDLESS = [
    f"image_tokenizer.training.{key}=100000"
    for key in ("steps", "checkpoint_every", "evaluate_every", "log_images_every")
]


def test_a_save_of_half_a_minute_by_two_processes_is_not_cut_short_by_a_stop(tiny_run: Path, tmp_path: Path) -> None:
    others = ("image-tokenizer", "tokenize", "transformer", "generate", "evaluate", "report", "mlflow*", "mlartifacts")
    run = Path(shutil.copytree(tiny_run, tmp_path / "runs" / "tiny", ignore=shutil.ignore_patterns(*others)))
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    config = [str(TINY), f"runs={run.parent}", "processes=2", NO_TRACKING, *ENDLESS]
    running = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", *config, "--only", "image-tokenizer"],
        env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)])), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = run / "image-tokenizer" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    asked = time.monotonic()
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=120)[1]
    assert time.monotonic() - asked > SLOW_S, "the disk was not slow"
    assert running.returncode == 75, said
    stopped = re.search(r"stopped at step (\d+)/100000", said)
    assert stopped, said
    (saved,) = (run / "image-tokenizer" / "checkpoints").iterdir()
    assert saved.name == f"step-{int(stopped[1]):08d}"
    assert (saved / "manifest.json").is_file()
