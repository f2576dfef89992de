"""Stage report: everything worth showing, as one HTML file that opens without a server.

Reads the directories of all stages of this pipeline before it; measures nothing itself. Writes index.html, and what
it shows as files of their own for the tracking. See pipeline/report/build.py.
"""

from __future__ import annotations

from pipeline.cli.stage import run_stage
from pipeline.core import distributed
from pipeline.core.atomic_io import write_atomic
from pipeline.core.progress import progress
from pipeline.orchestration.stage_run import StageRun
from pipeline.report.build import build_report


def main(run: StageRun) -> None:
    if distributed.is_main():
        directories = {name: run.input(name) for name in run.inputs}
        with progress(total=1, description="report", unit="page") as bar:
            report = build_report(directories, run.config)
            write_atomic(run.directory / "index.html", report.page)
            run.add_output("index.html", artifact=True)
            for name, content in report.files.items():
                write_atomic(run.directory / name, content)
                run.add_output(name, artifact=True)
            bar.update()
    distributed.barrier()


if __name__ == "__main__":
    run_stage("report", main)
