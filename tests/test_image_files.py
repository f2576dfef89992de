"""One function opens images from outside: the same pixels everywhere, and no format but those that are named."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pipeline.cli.main import cli
from pipeline.core.errors import UserError
from pipeline.data.images import ANY_SHAPE, FORMATS, BadSample, decode, size_of
from pipeline.data.prepare import prepare
from pipeline.evaluation.image_sets import images_at
from pipeline.image_tokenizer.base import build
from pipeline.sampling.save import open_image
from tests.data.sample_images import encoded, folder_config, image, write_folder
from tests.launch import ROOT

Image.init()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    small = {"kind": "dvae", "codebook_size": 32, "code_width": 8, "patch_size": 2, "widths": (16, 32), "blocks": 1}
    build(small, image_size=16).save_pretrained(folder)
    return folder


def _in_any_mode(kind: str) -> bytes | None:
    """A file of the format, in the first mode that it holds; None where Pillow writes none without further tools."""
    for mode in ("RGB", "RGBA", "L", "P", "1", "F"):
        try:
            return encoded(image(0, (16, 16)).convert(mode), kind)
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return None


@pytest.mark.parametrize("kind", sorted({*Image.OPEN, *Image.SAVE}))
def test_of_each_format_that_pillow_knows_only_the_named_are_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _in_any_mode(kind)
    tried: list[str] = []
    for name in list(Image.OPEN):
        if name not in FORMATS:
            monkeypatch.setitem(Image.OPEN, name, (lambda *_, name=name: tried.append(name), lambda _: True))
    if kind in (*FORMATS, "MPO"):
        assert content is not None
        assert decode(content).image.mode == "RGB"
    else:
        with pytest.raises(BadSample) as bad:
            decode(content or kind.encode() * 100)
        assert bad.value.reason == "not an image"
    assert tried == []


def test_only_named_formats_are_given_to_pillow_anywhere() -> None:
    """Files from outside go through `decode`; whoever else calls Pillow names the formats that we ourselves wrote."""
    decoder = ROOT / "pipeline/data/images.py"
    for path in (*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py"), *ROOT.glob("benchmarks/**/*.py")):
        if path == decoder:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                formats = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("formats")
                assert formats in ("('PNG',)", "('PNG', 'JPEG', 'WEBP')"), f"{path}:{node.lineno}: use decode"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is written when somebody starts the `gs` of the PATH."""
    ran = tmp_path / "gs-ran"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gs2"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow looks once
    assert shutil.which("gs") == str(tmp_path / "bin/gs")
    return ran


def test_an_eps_in_a_jpg_starts_no_ghostscript(tmp_path: Path, tokenizer: Path, ghostscript: Path) -> None:
    eps = encoded(image(0), "EPS")
    with pytest.raises(subprocess.CalledProcessError):  # what Pillow itself does with it
        Image.open(io.BytesIO(eps)).load()
    assert ghostscript.exists()
    ghostscript.unlink()
    folder = write_folder(tmp_path / "in", 2)
    (folder / "evil.jpg").write_bytes(eps)
    (folder / "evil.txt").write_text("a caption")
    index = prepare(tmp_path / "out", folder_config(folder, max_rejected_fraction=0.9), seed=0)
    assert index["rejected"]["reasons"] == {"not an image": 1}
    result = CliRunner().invoke(cli, ["reconstruct", str(tokenizer), str(folder), "-o", str(tmp_path / "sheets")])
    assert "refused: evil.jpg: not an image" in result.output
    with pytest.raises(UserError, match="--image: expected an image at .*evil.jpg"):
        open_image(folder / "evil.jpg", "--image")
    with pytest.raises(UserError, match="evil.jpg: expected an image"):
        _ = next(one for one in images_at(folder) if one.key == "evil").image
    assert not ghostscript.exists()


def _of_every_kind() -> dict[str, bytes]:
    """A file for each thing that makes two decoders differ."""
    picture = image(0, (20, 12))
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    clear = picture.convert("RGBA")
    clear.putalpha(picture.convert("L"))
    palette = picture.quantize(16)
    palette.info["transparency"] = 3
    return {
        "turned.jpg": encoded(picture, "JPEG", exif=turned),
        "turned.png": encoded(picture, "PNG", exif=turned),
        "deep.png": encoded(Image.fromarray(grey)),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "clear.webp": encoded(clear, "WEBP", lossless=True),
        "palette.png": encoded(palette),
        "still.gif": encoded(picture, "GIF"),
    }


def test_every_entry_sees_the_pixels_that_prepare_sees(tmp_path: Path) -> None:
    for name, content in _of_every_kind().items():
        (tmp_path / name).write_bytes(content)
    stored = {one.name: one for one in images_at(tmp_path)}
    assert len(stored) == 7
    for name, content in _of_every_kind().items():
        expected = decode(content, Path(name).suffix, ANY_SHAPE).image
        assert stored[name].image.tobytes() == expected.tobytes()
        assert open_image(tmp_path / name, "--image").tobytes() == expected.tobytes()
        assert stored[name].size(content) == size_of(content) == expected.size
    assert decode(_of_every_kind()["turned.jpg"]).image.size == (12, 20)
    deep = np.asarray(decode(_of_every_kind()["deep.png"]).image)[..., 0]
    assert (deep == np.asarray(image(0, (20, 12)).convert("L"))).all()


def test_too_many_pixels_are_refused_before_any_is_decoded(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(encoded(Image.new("1", (9_000, 9_000))))
    with pytest.raises(UserError, match="decompression bomb, 9000x9000 pixels, at most 64000000"):
        open_image(bomb, "--image")
    with pytest.raises(UserError, match="decompression bomb"):
        _ = images_at(bomb)[0].image
    with pytest.raises(UserError, match="decompression bomb"):
        images_at(bomb)[0].size(bomb.read_bytes())


def test_a_mask_is_what_is_painted_white(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    mask.putpixel((0, 0), (255, 255, 255, 255))
    mask.save(tmp_path / "mask.png")
    found = np.asarray(open_image(tmp_path / "mask.png", "--mask", background="black").convert("L"))
    assert found.tolist() == [[255, 0]]


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_bytes_a_decoder_gives_a_reason_and_no_other_exception(seed: int) -> None:
    rng = np.random.default_rng(seed)
    files = list(_of_every_kind().values())
    content = bytearray(files[seed % len(files)])
    for at in rng.integers(0, len(content), size=1 + seed % 8):
        content[at] = rng.integers(0, 256)
    for read in (decode, size_of):
        try:
            read(bytes(content))
        except BadSample:
            continue
