"""`smalti reconstruct` through the real command line's function: any images in, sheets and metrics out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.cli.main import cli
from pipeline.core.errors import UserError
from pipeline.core.image_io import to_tensor
from pipeline.data.shards import Sample, write_shard
from pipeline.evaluation.reconstruction import reconstruct as through
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.evaluation import reconstruction_grid
from pipeline.metrics.psnr_ssim import psnr
from tests.launch import launch


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["reconstruct", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    small = {"kind": "dvae", "codebook_size": 32, "code_width": 8, "patch_size": 2, "widths": (16, 32), "blocks": 1}
    build(small, image_size=16).save_pretrained(folder)
    return folder


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of every mode and size that people have, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    Image.fromarray(noise(16, 16)).save(folder / "exact.png")
    Image.fromarray(noise(37, 23)).save(folder / "sub" / "odd size.jpg")  # the factor, 4, divides neither side
    Image.fromarray(noise(3, 3)).save(folder / "tiny.bmp")
    Image.fromarray(noise(20, 20)[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise(20, 20, 4)).save(folder / "alpha.png")
    Image.fromarray(noise(20, 20, 4), mode="CMYK").save(folder / "cmyk.tif")
    Image.fromarray(noise(20, 20)[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "exact.png").read_bytes()[:100])
    frames = [Image.fromarray(noise(8, 8 + i)) for i in range(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(noise(10, 99)).save(folder / "long.png")
    return folder


def test_every_mode_and_size_comes_through_and_what_does_not_is_told_in_a_line(
    model: Path, images: Path, tmp_path: Path
) -> None:
    result = run(model, images, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = ["alpha.png", "cmyk.tif", "deep.png", "exact.png", "grey.png", "sub/odd size.jpg", "tiny.bmp"]
    assert sorted(metrics["images"]) == expected
    assert sorted(metrics["refused"]) == ["cut.png", "long.png", "moving.gif", "text.png"]
    told = [line for line in result.stderr.splitlines() if line.startswith("refused:")]
    assert len(told) == 4
    assert "refused: text.png: not an image" in result.stderr
    assert "SSIM" in result.stdout
    assert "over 7 images, 4 refused; 1 sheets" in result.stdout


def test_metrics_are_those_of_the_images_on_the_sheet(model: Path, images: Path, tmp_path: Path) -> None:
    from pipeline.image_tokenizer.base import ImageTokenizer

    run(model, images, "-o", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    original = Image.open(images / "exact.png")
    rebuilt = through(ImageTokenizer.from_pretrained(model), [original])
    [expected] = psnr(to_tensor([original]), to_tensor(rebuilt)).tolist()
    assert metrics["images"]["exact.png"]["psnr"] == pytest.approx(expected)
    sheet = Image.open(tmp_path / "sheet-000.png").convert("RGB")
    # exact.png is the fourth of the sorted names that came through, so its pair is the last of the first row.
    shown = [np.asarray(p.resize((128, 128), Image.Resampling.NEAREST)) for p in (original, *rebuilt)]
    left = 28 + 10 + 6 * (128 + 20 + 14)
    for i, image in enumerate(shown):
        cell = sheet.crop((left + i * 162, 38, left + i * 162 + 128, 166))
        assert np.array_equal(np.asarray(cell), image)


def test_images_go_through_as_many_at_once_as_have_a_million_pixels() -> None:
    torch.manual_seed(0)
    narrow = {"kind": "vqvae", "patch_size": 8, "widths": [8], "blocks": 1, "quantizer": {"kind": "fsq"}}
    tokenizer = build(narrow, 640).eval()
    taken: list[int] = []
    tokenizer.get_submodule("encoder").register_forward_pre_hook(lambda _, inputs: taken.append(len(inputs[0])))
    grid = reconstruction_grid(tokenizer, torch.zeros(3, 3, 640, 640).byte())
    assert grid.size == (3 * 160, 2 * 160)  # halved twice
    rebuilt = through(tokenizer, [Image.new("RGB", (640, 640))] * 3)
    assert [image.size for image in rebuilt] == [(640, 640)] * 3
    assert taken == 2 * [2, 1]


def test_a_tar_gives_the_same_metrics_as_its_images_in_a_folder(model: Path, images: Path, tmp_path: Path) -> None:
    names = ["exact.png", "grey.png", "deep.png"]
    folder = tmp_path / "some"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((images / name).read_bytes())
    samples = [Sample(Path(n).stem, (folder / n).read_bytes(), "a caption", {}) for n in sorted(names)]
    write_shard(tmp_path / "tars" / "000.tar", samples)
    for source in ("some", "tars"):
        assert run(model, tmp_path / source, "-o", tmp_path / f"{source}-out").exit_code == 0
    one, other = (json.loads((tmp_path / f"{s}-out" / "metrics.json").read_text()) for s in ("some", "tars"))
    assert list(one["images"].values()) == list(other["images"].values())


def test_a_limit_takes_the_first_images(model: Path, images: Path, tmp_path: Path) -> None:
    run(model, images, "-o", tmp_path, "--limit", 2)
    assert list(json.loads((tmp_path / "metrics.json").read_text())["images"]) == ["alpha.png", "cmyk.tif"]


def test_of_a_run_it_takes_the_tokenizer_and_the_filters(tiny_run: Path, images: Path, tmp_path: Path) -> None:
    output = launch("pipeline", "reconstruct", str(tiny_run), str(images), "-o", str(tmp_path))
    assert "over 7 images, 4 refused" in output
    assert (tmp_path / "sheet-000.png").is_file()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no tokenizer", "expected a run with a finished image-tokenizer, or a folder"),
        ("no folder", "expected a folder of images, a tar or a folder of tars, found nothing"),
        ("empty folder", "found no image or tar"),
        ("nothing usable", "found none that can be used (1 refused)"),
    ],
)
def test_what_cannot_work_is_one_line(case: str, message: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no image")
    tokenizer = tmp_path / "empty" if case == "no tokenizer" else model
    folder = tmp_path / {"no folder": "gone", "empty folder": "empty"}.get(case, "bad")
    result = run(tokenizer, folder, "-o", tmp_path / "out")
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
