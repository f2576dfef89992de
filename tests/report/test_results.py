"""benchmarks/results.py: the page of results is made from finished runs alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.results import main, section
from pipeline.core.errors import UserError
from pipeline.report.numbers import metric


def test_every_measured_metric_of_a_finished_run_is_a_row_with_its_interval_and_protocol(
    tiny_run: Path, tmp_path: Path
) -> None:
    page = section(tiny_run, "two cores", tmp_path)
    rows = json.loads((tiny_run / "evaluate" / "metrics.json").read_text())["rows"]
    measured = [row for row in rows if row["value"] is not None]
    assert page.count("| smalti |") == len(measured) > 10
    for row in measured:
        low, high = (metric(end) for end in row["interval"] or (None, None))
        interval = f" {low} – {high} " if row["interval"] else "  "
        cells = f"| {metric(row['value'])} |{interval}| {row['compares']} | {row['n_generated']:,} |"
        assert any(line.startswith(f"| {row['metric']} |") and cells in line for line in page.splitlines())
    assert " on two cores: " in page
    assert "weights " in page
    assert (tmp_path / "results-tiny.png").read_bytes() == (tiny_run / "generate" / "prompts.png").read_bytes()


def test_a_run_that_is_not_finished_makes_no_row(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", ignore=shutil.ignore_patterns("mlflow*", "mlartifacts")))
    (run / "evaluate" / "_SUCCESS").unlink()
    with pytest.raises(UserError, match="evaluate"):
        section(run, "two cores", tmp_path)


def test_the_parts_on_other_runs_and_the_one_by_hand_stay(tiny_run: Path, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    other = "## other\n\n    smalti run other.yaml\n\n| metric |\n"
    page.write_text(f"# Results\n\n## tiny\n\nof before\n\n{other}\n## For larger machines\n\nby hand\n")
    done = CliRunner().invoke(main, [str(tiny_run), "--machine", "two cores", "--out", str(page)])
    assert done.output == f"2 runs in {page}\n"
    text = page.read_text()
    assert section(tiny_run, "two cores", tmp_path) in text
    assert "of before" not in text
    assert text.endswith(f"{other}\n## For larger machines\n\nby hand\n")
