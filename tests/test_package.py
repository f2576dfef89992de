"""`import pipeline` costs nothing, and has the classes of the Python interface."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pipeline
from tests.launch import environment

CLASSES = ("ImageTokenizer", "Pipeline", "TextTokenizer", "Transformer")


@pytest.mark.slow
def test_the_classes_are_there_and_torch_is_imported_when_one_is_used() -> None:
    code = (
        "import sys, pipeline; before = 'torch' in sys.modules;"
        f"from pipeline import {', '.join(CLASSES)};"
        f"print(before, 'torch' in sys.modules, [one.__name__ for one in ({', '.join(CLASSES)})])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"False True {list(CLASSES)}"


def test_the_classes_are_listed() -> None:
    assert set(CLASSES) < set(dir(pipeline))
    assert set(CLASSES) < set(pipeline.__all__)


def test_an_unknown_name_is_an_attribute_error_that_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Painter'; it has ImageTokenizer, Pipeline"):
        pipeline.Painter  # noqa: B018
