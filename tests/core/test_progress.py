"""Progress in a file is lines now and then; on a terminal it is a bar, and the log has the lines."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from pipeline.core import progress as module
from pipeline.core.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(steps: int = 2000) -> None:
    with progress(total=steps, description="train", unit="step") as bar:
        for step in range(steps):
            bar.update(1)
            bar.set_postfix_str(f"loss {step}")


def test_in_a_file_progress_is_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    work()
    assert "\r" not in file.getvalue()
    assert len(file.getvalue().splitlines()) == 1
    assert file.getvalue().startswith("train: 2000/2000 step [")
    assert "loss 1999" in file.getvalue()


def test_in_a_file_pauses_between_lines_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    seconds = iter(range(0, 10**9, 5))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(seconds)))
    work(2000)
    assert 5 < len(file.getvalue().splitlines()) < 60


def test_on_a_terminal_the_log_has_what_the_bar_showed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO):
        work()
    assert "\r" in terminal.getvalue()
    assert [record.getMessage().split(" [")[0] for record in caplog.records] == ["train: 2000/2000 step"]


def test_a_bar_without_a_total_and_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    assert list(progress((n for n in range(3)), description="captions", unit="caption")) == [0, 1, 2]
    assert file.getvalue().startswith("captions: 3 caption [")
    assert list(progress([1, 2], description="no", shown=False)) == [1, 2]
    assert "no:" not in file.getvalue()
