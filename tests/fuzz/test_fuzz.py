"""A small count of what `python -m tests.fuzz --count 5000` does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.harness import cases, fuzz, run_case


@pytest.mark.parametrize("kind", sorted(cases(None)))
def test_malformed_input_gets_a_line_or_a_count(kind: str) -> None:
    found = [f for f in fuzz({kind: cases(None)[kind]}, seed=0, numbers=range(10)) if f]
    assert not found


def test_a_damaged_run_directory_gets_a_line_and_is_not_changed_by_a_refused_command(tiny_run: Path) -> None:
    found = [f for f in fuzz({"run": cases(tiny_run)["run"]}, seed=0, numbers=range(30)) if f]
    assert not found


def test_what_must_not_be_is_found() -> None:
    def broken(folder: Path, rng: object) -> None:
        raise KeyError("a traceback")

    found = run_case(broken, "x:0:0")
    assert found is not None
    assert "a traceback" in found.what
