"""One `smalti serve` of the tiny run for all tests of the room, as a user starts it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.config.transformer import TransformerShape
from pipeline.core.atomic_io import read_json, write_json
from pipeline.image_tokenizer.base import build
from pipeline.sampling.export import export_run
from pipeline.transformer.build import build_transformer, load_transformer
from pipeline.transformer.layout import Layout
from tests.launch import command, environment


@contextmanager
def serving(
    run: Path, *options: str, module: str = "pipeline", **extra: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, and its process; `extra`: of its environment."""
    started = command(module, ["serve", str(run), "--port", "0", *options])
    process = subprocess.Popen(started, env=environment(**extra), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"open (http://\S+/)", line):
                break
        else:
            raise AssertionError(said)
        yield found[1], process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def server(tiny_run: Path) -> Iterator[str]:
    """The address of a server that takes one guided image at once, and 20 requests in its queue."""
    with serving(tiny_run, "--slots", "4", "--waiting", "20") as (address, _):
        yield address


@pytest.fixture(scope="session")
def long_images(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the tiny run for images of 128 x 128 pixels, 1,024 codes, whose transformer is untrained."""
    folder = tmp_path_factory.mktemp("long") / "exported"
    export_run(tiny_run, folder)
    config = read_json(folder / "image-tokenizer" / "config.json")
    write_json(folder / "image-tokenizer" / "config.json", config | {"image_size": 128})
    small = load_transformer(folder / "transformer")
    layout = Layout.of(small.layout.text_length, small.layout.text_vocab_size, [(32, 32, 64)])
    build_transformer(layout, small.shape).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def any_order(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the tiny run whose transformer, untrained, is of order any."""
    folder = tmp_path_factory.mktemp("any") / "exported"
    export_run(tiny_run, folder)
    _untrained("any", load_transformer(folder / "transformer").layout, folder)
    return folder


@pytest.fixture(scope="session")
def scale_order(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the tiny run whose image tokenizer of three levels and next-scale transformer are untrained."""
    folder = tmp_path_factory.mktemp("scale") / "exported"
    export_run(tiny_run, folder)
    raster = load_transformer(folder / "transformer").layout
    codebook = {"kind": "ema", "codebook_size": 16, "code_width": 4}
    quantizer = {"kind": "multiscale", "scales": [1, 2, 4], "codebook": codebook}
    config = {"kind": "vqvae", "patch_size": 4, "widths": [8], "blocks": 1, "quantizer": quantizer}
    torch.manual_seed(0)
    tokenizer = build(config, 16)
    tokenizer.save_pretrained(folder / "image-tokenizer")
    _untrained("scale", Layout.of(raster.text_length, raster.text_vocab_size, tokenizer.levels), folder)
    return folder


def _untrained(order: str, layout: Layout, folder: Path) -> None:
    """Write a transformer whose codes follow from the prompt and from each other."""
    torch.manual_seed(0)
    shape = TransformerShape.model_validate({"layers": 2, "width": 64, "heads": 2, "order": order})
    model = build_transformer(layout, shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "transformer")
