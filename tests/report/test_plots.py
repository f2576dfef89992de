"""The plots of trainings show what is asked of them, whatever the number of levels."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from pipeline.report.plots import Panel, panels, standalone

TOTALS = ["loss", "loss/image", "loss/text", "val/loss/image", "val/loss/text"]


def losses(levels: int) -> list[dict[str, float]]:
    """The history of a transformer over an image tokenizer of so many levels."""
    names = TOTALS + [f"{split}loss/image/{level}" for split in ("", "val/") for level in range(levels)]
    return [
        {"step": float(step), "time": 0.0} | {name: 5.0 - 0.1 * i + 1 / step for i, name in enumerate(names)}
        for step in range(1, 9)
    ]


def shown(panel: Panel) -> set[str]:
    """What the plot's texts say, the legend's among them."""
    return {text for element in ElementTree.fromstring(standalone(panel.svg)).iter() if (text := element.text)}


def line_looks(panel: Panel) -> list[str]:
    return [
        element.get("style", "")
        for element in ElementTree.fromstring(standalone(panel.svg)).iter("{http://www.w3.org/2000/svg}path")
        if "stroke: var(--line" in element.get("style", "") and "stroke-width: 1.5" in element.get("style", "")
    ]


@pytest.mark.parametrize("levels", [2, 4, 10, 20])
def test_the_losses_of_the_validation_split_are_shown_of_models_of_any_number_of_levels(levels: int) -> None:
    panel = panels(losses(levels), "transformer")[0]
    assert set(TOTALS) <= shown(panel)
    if levels <= 10:
        assert {f"val/loss/image/{level}" for level in range(levels)} <= shown(panel)
    looks = line_looks(panel)
    assert len(set(looks)) == len(looks) // 2  # each once in the plot, once in the legend
    assert panel.note == ("" if 5 + 2 * levels <= 16 else f"16 of {5 + 2 * levels} curves; metrics.jsonl has all")


@pytest.mark.parametrize("best", ["val/loss/image", "val/loss/image/19", "loss/image/19"])
def test_the_metric_that_chose_the_model_is_shown_with_its_ring_among_many(best: str) -> None:
    history = losses(20)
    ringed, plain = (panels(history, "transformer", chosen)[0] for chosen in ((best, history[4][best], 5), None))
    assert best in shown(ringed)
    assert ringed.svg.count("<use ") > plain.svg.count("<use ")
