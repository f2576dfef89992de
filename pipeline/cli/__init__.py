"""The command line. What starts here knows what stages read from outside of the run (`orchestration/outside.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.orchestration.outside import register

if TYPE_CHECKING:
    from pipeline.config.pipeline import PipelineConfig


def _source_of_prepare(config: PipelineConfig) -> str | None:
    from pipeline.data.source_stamp import stamp_of_all

    return stamp_of_all(config.prepare.all_sources)


register("prepare", _source_of_prepare)
