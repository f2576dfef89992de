"""The stage transformer up to its first step: the most memory that it took, and of what, in a file a rank.

They go to the folder START_MEMORY. What was resident after the start of a tiny model, which imports all that a start
imports, is left out.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

import psutil

from benchmarks.plan_memory import status_bytes
from pipeline.cli.stage import run_stage
from pipeline.core import distributed
from pipeline.core.errors import StoppedOnRequest
from pipeline.orchestration.stage_run import StageRun
from pipeline.training import trainer
from stages import transformer

_build_engine = trainer.build_engine
before = 0


def _and_tell(*arguments: Any) -> Any:
    _build_engine(*arguments)
    objective = arguments[1]
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in objective.parameters()]
    told = {"peak": status_bytes("VmHWM") - before, "parameters": sum(sizes), "largest": max(sizes)}
    Path(os.environ["START_MEMORY"], f"{distributed.rank()}.json").write_text(json.dumps(told))
    distributed.barrier()
    raise StoppedOnRequest("as this test asks")


def main(run: StageRun) -> None:
    global before
    tiny = run.config.transformer.model_copy(update={"layers": 1, "width": 64, "heads": 2})
    first = copy(run)
    first.config = run.config.model_copy(update={"transformer": tiny})
    with suppress(StoppedOnRequest):
        transformer.main(first)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = psutil.Process().memory_info().rss
    transformer.main(run)


if __name__ == "__main__":
    trainer.build_engine = _and_tell
    run_stage("transformer", main)
