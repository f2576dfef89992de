"""docs/config.md: every key, as it is in the code today."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from pipeline.cli.config_reference import page
from pipeline.config.base import Config, nested_classes, operational
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.reference import meaning, reference
from pipeline.slurm.cluster import ClusterConfig
from tests.launch import ROOT


def _classes(cls: type[Config]) -> set[type[Config]]:
    inner = [found for info in cls.model_fields.values() for found in nested_classes(info.annotation)]
    return {cls}.union(*(_classes(found) for found in inner))


CLASSES = sorted(_classes(PipelineConfig) | _classes(ClusterConfig), key=lambda cls: cls.__name__)


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == page(), (
        "run: python -m pipeline.cli.config_reference > docs/config.md"
    )


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_says_what_it_means_and_is_on_the_page(cls: type[Config]) -> None:
    assert [name for name in cls.model_fields if not meaning(cls, name)] == []
    assert [name for name in cls.model_fields if f"| `{name}` |" not in page()] == []


class _Inner(Config):
    """Section `inner`: something inside. More about it."""

    share: float = Field(0.5, gt=0, le=1, description="a share; None: none")


class _Outer(Config):
    """The outer one."""

    inner: _Inner = _Inner(share=0.25)
    items: list[Annotated[int, Field(ge=1)]] = Field([1, 2], description="some a|b")
    every: int | None = operational(None, description="an interval")


def test_a_row_has_type_default_meaning_and_whether_results_change() -> None:
    text = reference(_Outer, "Outer", changes_results=True)
    assert "| `inner` | [inner](#inner) | `{share: 0.25}` | Something inside | yes |" in text
    assert "| `share` | number > 0 and ≤ 1 | `0.5` | a share; null: none | yes |" in text
    assert "| `items` | list of integer ≥ 1 | `[1, 2]` | some a\\|b | yes |" in text
    assert "| `every` | integer or null | `null` | an interval | no |" in text
