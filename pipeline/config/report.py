"""Section `report`. Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Config


class ReportConfig(Config):
    """How report/index.html looks; nothing in it is measured by this stage."""

    title: str | None = Field(None, description="heading of the page; None: the run's name")
    enlargement: Literal["auto", "smooth", "pixelated"] = Field(
        "auto", description="how browsers enlarge images; auto: pixelated below 48 pixels"
    )
