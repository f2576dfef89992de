"""docs/results.md: what shipped configs came to, from the directories of their finished runs.

    python -m benchmarks.results runs/openmoji runs/shapes --machine "2 cores of a Xeon, 24 GB"

Of each run: the command, what was changed in the config, the time of each stage, the metrics with intervals, protocol,
n, extractor and resize, and the sheet of its prompts, copied beside the page. A stage that is not finished for
the run's config is an error: no number of a run is put beside those of another one. The parts on other runs stay as
they are, and so does the page's last part, from "For larger machines" on, which is written by hand.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from pipeline.config.base import differences, identity
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.evaluation.results import read_results, rows_in
from pipeline.evaluation.rows import Row
from pipeline.orchestration.graph import stages_of
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.orchestration.run_record import recorded_source
from pipeline.report.numbers import duration, metric
from pipeline.report.run_facts import RunFacts, read_facts

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results.md"
_BY_HAND = "## For larger machines"
_HEAD = """# Results

Shipped configs, run to their end by the command that stands beside them. `python -m benchmarks.results RUN … --machine
TEXT` writes the parts on these runs anew from their directories. Times are of all stages together; intervals, protocols
and what each metric compares: [evaluation.md](evaluation.md).
"""


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--machine", required=True, help="that the runs were made on, in words")
@click.option("--out", default=OUT, show_default=True, type=click.Path(path_type=Path))
def main(runs: Sequence[Path], machine: str, out: Path) -> None:
    """Write what these finished runs came to."""
    made, by_hand = parts(out.read_text() if out.is_file() else "")
    made |= {run.name: section(run, machine, out.parent) for run in runs}
    out.write_text("\n".join([_HEAD, *made.values(), by_hand]))
    click.echo(f"{len(made)} runs in {out}")


def parts(page: str) -> tuple[dict[str, str], str]:
    """The page's parts on runs by the runs' names, in its order, and the part that was written by hand."""
    begin = page.index(_BY_HAND) if _BY_HAND in page else len(page)
    found = re.split(r"^## (.+)\n", page[:begin], flags=re.MULTILINE)[1:]
    made = {name: f"## {name}\n{text.rstrip()}\n" for name, text in zip(found[::2], found[1::2], strict=True)}
    return made, page[begin:]


def section(run: Path, machine: str, folder: Path) -> str:
    """The part of the page on one run; its sheet of samples goes into `folder`.

    Raises:
        UserError: a stage is not finished for the run's config.
    """
    config, directory = load_pipeline(run), RunDirectory(run)
    for stage in stages_of(config):
        directory.usable(config, stage)
    stages = {stage.name: run / stage.name for stage in stages_of(config) if stage.name != "report"}
    facts, rows = read_facts(stages), rows_in(read_results(run / "evaluate"))
    lines = [f"## {run.name}", "", *_about(run, config, facts, machine), "", *_table(rows), "", *_features(rows)]
    if (run / "generate" / "prompts.png").is_file():
        shutil.copyfile(run / "generate" / "prompts.png", folder / f"results-{run.name}.png")
        lines += ["", f"![Generated images of {run.name}](results-{run.name}.png)"]
    return "\n".join(lines) + "\n"


def _about(run: Path, config: PipelineConfig, facts: RunFacts, machine: str) -> list[str]:
    source = recorded_source(run)
    shipped = next((path for path in (ROOT / "configs").glob("*.yaml") if path.name == source), None)
    changed = differences(identity(load_pipeline(shipped)), identity(config)) if shipped else []
    command = f"smalti run {shipped.relative_to(ROOT) if shipped else source}"
    times = [f"{name} {duration(stage.wall_time_s)}" for name, stage in facts.stages.items() if stage.wall_time_s]
    sizes = [f"{stage.name} {stage.parameters / 1e6:.3g} M" for stage in facts.trained if stage.parameters]
    commit = str(facts.code.get("commit") or "unknown")[:10]
    return [
        f"    {command}",
        "",
        f"- {duration(facts.wall_time_s)} on {machine}: {', '.join(times)}",
        f"- parameters: {', '.join(sizes)}; seed {config.seed}; commit {commit}"
        f"{', with changes' if facts.code.get('changed') else ''}",
        *([f"- changed from the shipped config: {'; '.join(changed)}"] if changed else []),
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    """A row a metric that was measured."""
    lines = ["| metric | | value | interval | compares | n | protocol |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.value is None:
            continue
        interval = f"{metric(row.interval[0])} – {metric(row.interval[1])}" if row.interval else ""
        better = "↓" if row.better == "lower" else "↑"
        lines.append(
            f"| {row.metric} | {better} | {metric(row.value)} | {interval} | {row.compares} | {row.n_generated:,} |"
            f" {row.protocol} |"
        )
    return lines


def _features(rows: Sequence[Row]) -> list[str]:
    used = {(row.extractor, (row.weights_sha256 or "")[:12], row.resize) for row in rows if row.extractor}
    return [
        f"Features of {name}, weights {sha256}, images"
        f" {'' if str(resize).startswith('not') else 'resized to '}{resize}."
        for name, sha256, resize in sorted(used, key=str)
    ]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
