"""A process of tests/orchestration/test_node_files.py: begins a stage, and says what it has looked at."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from pipeline.config.pipeline import load_pipeline
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.stage_run import execute
from tests.conftest import TINY


def main(runs: str) -> None:
    """`runs`: the folder that this process's node sees."""
    looked: Counter[str] = Counter()
    stat = os.stat

    def counted(path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        looked[Path(path).name] += 1
        return stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    def opened(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("manifest.json"):
            looked["opened"] += 1

    distributed.init()
    config = load_pipeline(TINY, [f"runs={runs}", "transformer.layers=1"])
    os.stat = counted  # type: ignore[assignment]
    sys.addaudithook(opened)
    try:
        execute(stage_named("transformer"), config, "tiny.yaml", None, lambda run: None)
    except UserError as error:
        print(f"error: {error}", flush=True)
    print("looked", looked["output.txt"], "opened", looked["opened"], flush=True)
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
