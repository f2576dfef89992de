"""`smalti data`, on real shards and on arrays made by real tokenizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import cli
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_samples
from pipeline.data.tokens import TokenArrays
from pipeline.image_tokenizer.base import ImageTokenizer
from tests.data.sample_images import folder_config
from tests.data.small_run import make_small_run

SAMPLES = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_run(tmp_path_factory.mktemp("run"), SAMPLES, TokenizeConfig(crops=2, batch_size=8))


def _smalti(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["data", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_inspect_tells_counts_captions_and_checksums_of_a_run_and_draws_a_sheet(run: Path, tmp_path: Path) -> None:
    output = _smalti("inspect", run, "-o", tmp_path / "sheet.png")
    arrays = TokenArrays(run / "tokenize", "train")
    assert f"{len(arrays):>12,} samples in 3 shards" in output
    assert "captions: 14 to 15 characters, median 15" in output
    assert "every shard is, byte for byte, as prepare wrote it" in output
    assert "codes 8x8 of 32" in output
    assert "2 crops each" in output
    assert "every array is what its checksum says" in output
    assert Image.open(tmp_path / "sheet.png").width > 16


def test_inspect_names_a_replaced_tar_and_a_flipped_byte(tmp_path: Path) -> None:
    run = make_small_run(tmp_path, 12, TokenizeConfig())
    array = run / "tokenize/train/000.tokens"
    content = bytearray(array.read_bytes())
    content[-3] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=r"train/000\.tokens is damaged between bytes 0 and \d+: expected"):
        _smalti("inspect", run)
    _smalti("inspect", "--no-verify", run)
    array.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train/000\.tokens is damaged: expected \d+ bytes, found"):
        _smalti("inspect", "--no-verify", run)
    array.write_bytes(content)
    tar = run / "prepare/train/000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512] + b"x" * 512)
    with pytest.raises(UserError, match=r"train/000000\.tar is not the shard that prepare wrote"):
        _smalti("inspect", run)
    shutil.rmtree(run / "prepare")
    prepare(run / "prepare", folder_config(run / "in", image_size=16, validation_fraction=0.1), seed=0)
    places = run / "prepare/train/000000.index.npy"
    content = bytearray(places.read_bytes())
    content[-24 * 3] ^= 1  # where the third image from the end begins
    places.write_bytes(content)
    with pytest.raises(UserError, match=r"train/000000\.tar is damaged at sample \d+: wrong checksum"):
        _smalti("inspect", run)


def test_inspect_of_something_else_says_what_it_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a run, or its prepare or tokenize directory"):
        _smalti("inspect", tmp_path)


def test_export_writes_what_the_tokenizer_makes_of_every_crop_and_the_captions(run: Path, tmp_path: Path) -> None:
    assert "10 images" in _smalti("export", run, "-o", tmp_path, "-n", 5)
    captions = sorted(path.name for path in tmp_path.glob("*.txt"))
    assert len(captions) == 5
    key = captions[0].removesuffix(".txt")
    assert (tmp_path / captions[0]).read_text() == f"image number {int(key)}\n"
    whole, crop = (np.asarray(Image.open(tmp_path / f"{key}{name}.png")) for name in ("", ".crop-1"))
    assert whole.shape == (16, 16, 3)
    assert (whole != crop).any()
    assert (tmp_path / "sheet.png").exists()


VQVAE2 = {
    "kind": "vqvae2",
    "patch_size": 2,
    "widths": [16, 16],
    "blocks": 1,
    "block_kernels": [3, 1],
    "quantizers": [{"kind": "ema", "codebook_size": size, "code_width": 8} for size in (16, 64)],
}


def test_a_tokenizer_of_two_levels_is_tokenized_inspected_and_exported(tmp_path: Path) -> None:
    run = make_small_run(tmp_path, 20, TokenizeConfig(crops=2, batch_size=8), model=VQVAE2)
    assert "codes 4x4 of 16, 8x8 of 64" in _smalti("inspect", run)
    _smalti("export", run, "-o", tmp_path / "out", "-n", 3)
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer/model")
    originals = {sample.key: np.array(sample.image) for sample in read_samples(run / "prepare", "train")}
    captions = list((tmp_path / "out").glob("*.txt"))
    assert len(captions) == 3
    for caption in captions:
        images = torch.from_numpy(originals[caption.stem]).permute(2, 0, 1)[None].float() / 255
        expected = tokenizer.decode(tokenizer.encode(images))[0].mul(255).round().byte().permute(1, 2, 0)
        assert (np.asarray(Image.open(caption.with_suffix(".png"))) == expected.numpy()).all()


def test_export_refuses_tokenizers_that_did_not_make_the_arrays(run: Path, tmp_path: Path) -> None:
    other = make_small_run(tmp_path / "other", 12, TokenizeConfig(), seed=1)
    with pytest.raises(UserError, match="was made by another image-tokenizer"):
        _smalti("export", run, "-o", tmp_path / "out", "--image-tokenizer", other / "image-tokenizer/model")


def test_the_command_line_knows_no_torch() -> None:
    code = "import sys, pipeline.cli.data, pipeline.data.inspect; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
