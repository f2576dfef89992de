"""`smalti reconstruct RUN IMAGES -o DIR`: what a tokenizer makes of any images. Imports no torch until it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.config.prepare import FilterConfig
    from pipeline.image_tokenizer.base import ImageTokenizer

_PATH = click.Path(path_type=Path)
_PAIRS = 64  # on a sheet
_IDENTICAL_DB = 100.0  # stands for infinity, the PSNR of equal images


@click.command("reconstruct")
@click.argument("tokenizer", type=_PATH, metavar="RUN")
@click.argument("images", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="folder for the sheets and metrics.json")
@click.option("--limit", type=click.IntRange(min=1), help="so many images at most")
def reconstruct(tokenizer: Path, images: Path, output: Path, limit: int | None) -> None:
    """Put IMAGES through the codes of an image tokenizer and back, and show both side by side.

    RUN is a run, or a folder with a tokenizer's config.json and model.safetensors. IMAGES is a folder of images, a
    tar, or a folder of tars; they are cropped and resized as `prepare` does it. Prints the mean PSNR and SSIM.
    """
    from pipeline.core.atomic_io import write_json
    from pipeline.core.distributed import device
    from pipeline.image_tokenizer.base import ImageTokenizer

    model = ImageTokenizer.from_pretrained(_model_at(tokenizer)).to(device())
    found: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    sheets = 0
    for batch in _batches(_usable(images, model.image_size, _filters(tokenizer), refused), limit):
        found |= _rebuild(model, batch, output / f"sheet-{sheets:03d}.png")
        sheets += 1
    for name, why in refused.items():
        click.echo(f"refused: {name}: {why}", err=True)
    if not found:
        raise UserError(f"{images}: expected images, found none that can be used ({len(refused)} refused)")
    means = {key: sum(metrics[key] for metrics in found.values()) / len(found) for key in next(iter(found.values()))}
    write_json(output / "metrics.json", {"mean": means, "images": found, "refused": refused})
    told = ", ".join(f"{_LABELS[key].format(value)}" for key, value in means.items())
    click.echo(f"{told} over {len(found)} images, {len(refused)} refused; {sheets} sheets in {output}")


_LABELS = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}"}


def _model_at(path: Path) -> Path:
    for folder in (path, path / "model", path / "image-tokenizer" / "model"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise UserError(
        f"{path}: expected a run with a finished image-tokenizer, or a folder with a tokenizer's config.json and"
        " model.safetensors, found neither; run image-tokenizer first"
    )


def _filters(path: Path) -> FilterConfig:
    """Those of the run; of a tokenizer alone, the defaults."""
    from pipeline.config.pipeline import load_pipeline
    from pipeline.config.prepare import FilterConfig

    if (path / "config.yaml").is_file():
        return load_pipeline(path / "config.yaml").prepare.filters
    return FilterConfig.model_validate({})


def _usable(path: Path, size: int, filters: FilterConfig, refused: dict[str, str]) -> Iterator[tuple[str, Image.Image]]:
    """(name, RGB image of size × size) of what is at `path`; what `prepare` would not take goes to `refused`."""
    from pipeline.data.images import BadSample, decode, square

    for name, extension, content in _contents(path):
        try:
            yield name, square(decode(content, extension, filters).image, size)
        except BadSample as bad:
            refused[name] = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason


def _contents(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, extension, bytes), sorted by name."""
    from pipeline.config.prepare import FolderSource
    from pipeline.evaluation.image_sets import images_at

    if not path.exists():
        raise UserError(f"{path}: expected a folder of images, a tar or a folder of tars, found nothing")
    extensions = FolderSource.model_fields["extensions"].default
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in extensions) if path.is_dir() else []
    if not files and path.suffix.lower() in extensions:
        files = [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        yield name, file.suffix.lower(), file.read_bytes()
    if not files:
        for image in images_at(path):
            yield f"{image.place.file.name}/{image.key}", "", image.content()


def _batches(images: Iterator[tuple[str, Image.Image]], limit: int | None) -> Iterator[list[tuple[str, Image.Image]]]:
    from itertools import islice

    from pipeline.core.progress import progress

    with progress(total=None, description="reconstruct", unit="image") as bar:
        images = islice(images, limit)
        while batch := list(islice(images, _PAIRS)):
            yield batch
            bar.update(len(batch))


def _rebuild(model: ImageTokenizer, batch: list[tuple[str, Image.Image]], sheet: Path) -> dict[str, dict[str, float]]:
    """Each image's metrics, and the batch on one sheet: an image, and beside it what its codes decode to."""
    from pipeline.core.atomic_io import atomic_path
    from pipeline.evaluation.reconstruction import reconstruct as rebuilt_by
    from pipeline.evaluation.reconstruction import stacked
    from pipeline.metrics.psnr_ssim import psnr, ssim
    from pipeline.sampling.grid import Group, Tile, grid

    names, originals = [name for name, _ in batch], [image for _, image in batch]
    rebuilt = rebuilt_by(model, originals)
    pair = stacked(originals), stacked(rebuilt)
    decibels = psnr(*pair).clamp(max=_IDENTICAL_DB).tolist()
    metrics = [{"psnr": value} for value in decibels]
    if model.image_size >= 11:  # SSIM's window
        metrics = [one | {"ssim": value} for one, value in zip(metrics, ssim(*pair).tolist(), strict=True)]
    tiles = []
    for name, original, after, value in zip(names, originals, rebuilt, decibels, strict=True):
        tiles += [Tile(original, name), Tile(after, f"{value:.1f} dB")]
    with atomic_path(sheet) as temporary:
        grid([Group("", tiles)]).save(temporary, format="png")
    return dict(zip(names, metrics, strict=True))
