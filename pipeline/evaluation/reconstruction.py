"""Reconstructions: images through the codes of a tokenizer and back, of any folder as sheets of pairs with PSNR, SSIM.

rebuilt = reconstruct(tokenizer, images)                                    # PIL images
found = reconstruct_folder(tokenizer_at(run), images, filters_of(run), output)      # `smalti reconstruct`
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from PIL import Image

from pipeline.config.pipeline import is_run_config, load_pipeline
from pipeline.config.prepare import FilterConfig
from pipeline.core.atomic_io import write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes, to_pil, to_tensor
from pipeline.core.image_size import ImageSize, images_at_once
from pipeline.core.iteration import batched
from pipeline.core.progress import progress
from pipeline.data.images import BadSample, cropped, decode
from pipeline.evaluation.image_sets import ImageSet, read_set
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.psnr_ssim import WINDOW, psnr, ssim
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from pipeline.sampling.grid import Group, Tile, grid

_PAIRS = 64  # per sheet


@torch.inference_mode()
def reconstruct(tokenizer: ImageTokenizer, images: list[Image.Image], batch_size: int = 64) -> list[Image.Image]:
    """Images of the tokenizer's size through its codes and back, rounded to 8 bits as they would be saved.

    `batch_size`: at most so many pass the tokenizer at a time, and of large images fewer.
    """
    device = next(tokenizer.parameters()).device
    results: list[Image.Image] = []
    for batch in batched(images, min(batch_size, images_at_once(tokenizer.height, tokenizer.width))):
        results += to_pil(tokenizer.decode(tokenizer.encode(to_tensor(batch).to(device))))
    return results


def images_in_memory(tokenizer: ImageTokenizer, batch_size: int) -> int:
    """How many images to rebuild and look at before the next ones: whole batches, of large images a single one."""
    return max(images_at_once(tokenizer.height, tokenizer.width) // batch_size, 1) * batch_size


def tokenizer_at(path: Path) -> ImageTokenizer:
    """The image tokenizer of a run, or in a folder. Raises UserError when there is none that is finished."""
    if is_run_config(path / "config.yaml"):
        RunDirectory(path).usable(load_pipeline(path), stage_named("image-tokenizer"))
    for folder in (path, path / "model", path / "image-tokenizer" / "model"):
        if (folder / "model.safetensors").is_file():
            return ImageTokenizer.from_pretrained(folder)
    raise UserError(
        f"{path}: expected a run with a finished image-tokenizer, or a folder with a tokenizer's config.json and"
        " model.safetensors, found neither; run image-tokenizer first"
    )


def filters_of(path: Path) -> FilterConfig:
    """The filters of the run at `path`; of a tokenizer alone, the defaults."""
    if (path / "config.yaml").is_file():
        return load_pipeline(path / "config.yaml").prepare.filters
    return FilterConfig.model_validate({})


@dataclass
class Reconstructed:
    """What `reconstruct_folder` found."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # by image name: psnr (dB), ssim
    refused: dict[str, str] = field(default_factory=dict)  # why, by image name
    left_out: list[tuple[str, str]] = field(default_factory=list)  # name and reason of what is no image
    sheets: int = 0

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric over all images, of which there must be one."""
        first = next(iter(self.metrics.values()))
        return {key: sum(one[key] for one in self.metrics.values()) / len(self.metrics) for key in first}


def reconstruct_folder(
    tokenizer: ImageTokenizer, images: Path, filters: FilterConfig, output: Path, limit: int | None = None
) -> Reconstructed:
    """Every usable image at `images`, cropped and resized as `prepare` does it, beside what its codes decode to.

    Writes `output`/sheet-000.png … and `output`/metrics.json. Images that `filters` refuse are counted, not shown; a
    `limit` takes the first usable ones.

    Raises:
        UserError: there is nothing at `images`, or no image that can be used.
    """
    found = read_set(images)
    result = Reconstructed(left_out=found.left_out)
    usable = islice(_usable(found, tokenizer.image_size, filters, result.refused), limit)
    with progress(total=None, description="reconstruct", unit="image") as bar:
        for batch in batched(usable, _PAIRS):
            result.metrics |= _reconstruct_batch(tokenizer, batch, output / f"sheet-{result.sheets:03d}.png")
            result.sheets += 1
            bar.update(len(batch))
    if result.metrics:
        report: dict[str, object] = {"mean": result.means, "images": result.metrics, "refused": result.refused}
        report["left_out"] = [{"name": name, "reason": reason} for name, reason in result.left_out]
        write_json(output / "metrics.json", report)
    return result


def _usable(
    found: ImageSet, size: ImageSize, filters: FilterConfig, refused: dict[str, str]
) -> Iterator[tuple[str, Image.Image]]:
    """(name, RGB image of that size) of a set; what `prepare` would not take goes to `refused`."""
    for image in found.images:
        name = image.name
        try:
            yield name, cropped(decode(image.content(), image.extension, filters).image, size)
        except BadSample as bad:
            refused[name] = f"{bad.reason} ({bad.detail})" if bad.detail else bad.reason


def _reconstruct_batch(
    tokenizer: ImageTokenizer, batch: list[tuple[str, Image.Image]], sheet: Path
) -> dict[str, dict[str, float]]:
    """Each image's metrics, and the batch on one sheet: an image, and beside it what its codes decode to."""
    names, originals = [name for name, _ in batch], [image for _, image in batch]
    rebuilt = reconstruct(tokenizer, originals)
    pixels, rebuilt_pixels = to_tensor(originals), to_tensor(rebuilt)
    decibels = psnr(pixels, rebuilt_pixels).tolist()
    metrics = [{"psnr": value} for value in decibels]
    if min(tokenizer.height, tokenizer.width) >= WINDOW:
        similarities = ssim(pixels, rebuilt_pixels).tolist()
        metrics = [one | {"ssim": value} for one, value in zip(metrics, similarities, strict=True)]
    tiles = []
    for name, original, after, value in zip(names, originals, rebuilt, decibels, strict=True):
        tiles += [Tile(original, name), Tile(after, f"{value:.1f} dB")]
    write_atomic(sheet, png_bytes(grid([Group("", tiles)])))
    return dict(zip(names, metrics, strict=True))
