"""A run on an image tokenizer of another library: it generates, and what is exported of it needs neither of the two."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from pipeline.image_tokenizer import ImageTokenizer
from pipeline.sampling.pipeline import Pipeline
from tests.conftest import NO_TRACKING
from tests.image_tokenizer.test_pretrained import theirs
from tests.launch import launch


def test_a_run_on_weights_of_another_library_generates_and_its_export_stands_alone(
    tiny_run: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "taming.safetensors"
    save_file(theirs("taming"), weights)
    changes = ["image_tokenizer.model=null", f"image_tokenizer.pretrained={{library: taming, path: {weights}}}"]
    changes += ["image_tokenizer.training.steps=1", "image_tokenizer.training.warmup_steps=0"]
    launch("pipeline", "run", str(tiny_run), f"runs={tmp_path}", *changes, NO_TRACKING)
    run, exported = tmp_path / "tiny", tmp_path / "exported"
    assert ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model").config.kind == "vqgan"

    of_run = Pipeline.from_pretrained(run).generate(["joker"], candidates=2)
    launch("pipeline", "export", str(run), str(exported))
    shutil.rmtree(run)
    weights.unlink()
    of_export = Pipeline.from_pretrained(exported).generate(["joker"], candidates=2)
    assert [one.image.tobytes() for one in of_export] == [one.image.tobytes() for one in of_run]
