"""Checkpoints on a disk or a file system that refuses: one line, and nothing that is there is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.atomic_io import read_json
from pipeline.training import checkpoint
from pipeline.training.checkpoint import Checkpoints
from tests.launch import ROOT, environment

REFUSES_LARGE_FILES = """
import resource, signal, sys
from pathlib import Path
import torch
from pipeline.core.errors import UserError
from pipeline.training.checkpoint import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for name in ("training.pt", "training-00000.safetensors"):
    try:
        Checkpoints(Path(sys.argv[1]), keep=1).save(7, {name: {"weight": torch.zeros(1 << 20)}})
    except UserError as error:
        print(error)
"""


def test_a_refusal_in_the_middle_of_a_file_is_one_line_of_either_kind_of_file(tmp_path: Path) -> None:
    code = [sys.executable, "-c", REFUSES_LARGE_FILES, str(tmp_path)]
    done = subprocess.run(code, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 2
    for line in told:
        assert "step-00000007: expected to write this checkpoint, found that the file system refuses ([Errno 27" in line


@pytest.mark.parametrize("unreadable", ["training.json", "manifest.json"])
def test_a_checkpoint_that_cannot_be_read_stays_as_it_is_and_the_one_before_is_loaded(
    unreadable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def restored() -> tuple[int | None, list[int]]:
        loaded: list[int] = []
        return checkpoints.restore(lambda directory: loaded.extend(read_json(directory / "weights.json"))), loaded

    checkpoints = Checkpoints(tmp_path, keep=2)
    monkeypatch.setattr(checkpoint, "_READ_AGAIN_S", 0.0)
    for step in (1, 2):
        checkpoints.save(step, {"weights.json": [step], "training.json": [step]})
        checkpoints.finish()
    newest = checkpoints.path(2)
    content = (newest / unreadable).read_bytes()
    (newest / unreadable).unlink()
    (newest / unreadable).symlink_to(unreadable)  # to itself: the system refuses whoever asks for it
    assert restored() == (1, [1])
    assert "step-00000002 is not usable" in caplog.text
    assert "cannot be read ([Errno 40]" in caplog.text
    (newest / unreadable).unlink()
    (newest / unreadable).write_bytes(content)
    assert restored() == (2, [2])
