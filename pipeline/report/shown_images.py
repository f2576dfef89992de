"""The images that the report shows, as PNGs: generated ones beside the training image that is nearest to each."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.core.image_io import from_png, png_bytes
from pipeline.core.text import visible
from pipeline.data.catalog import Catalog
from pipeline.evaluation.results import PromptEntry, ReconstructionEntry, Results, SampleEntry
from pipeline.sampling.grid import Group, Tile, grid


@dataclass(frozen=True)
class GeneratedImage:
    """A generated image, with the training image that it comes closest to; images are PNGs, text shows its controls."""

    prompt: str
    png: bytes
    nearest_png: bytes
    nearest_caption: str
    distance: float
    score: float | None = None


@dataclass(frozen=True)
class Reconstruction:
    """A real image and its reconstruction; images are PNGs, PSNR is in dB."""

    caption: str
    unseen: bool  # by the tokenizer's training
    psnr: float
    original_png: bytes
    png: bytes


class ShownImages:
    """The images that the results of the stage evaluate name, by group."""

    def __init__(self, directories: dict[str, Path], results: Results) -> None:
        originals = _real_images(directories["prepare"], results)
        self.prompts: dict[str, list[GeneratedImage]] = {"training": [], "new": []}
        for prompt in results["nearest"]:
            self.prompts[prompt["kind"]].append(_generated(prompt, directories["generate"], originals))
        self.samples: dict[str, list[GeneratedImage]] = {"random": [], "best": [], "worst": []}
        for sample in results["samples"]:
            self.samples[sample["group"]].append(_generated(sample, directories["evaluate"], originals))
        strip = directories["generate"] / "order.png"  # runs of before it was made have none
        self.order = strip.read_bytes() if strip.is_file() else None
        self.reconstructions = [
            _reconstruction(entry, directories["evaluate"], originals) for entry in results["reconstructions"]
        ]

    def sheets(self) -> dict[str, bytes]:
        """A PNG of each group of generated images that has any, by file name."""
        groups = {f"prompts-{kind}": found for kind, found in self.prompts.items()} | self.samples
        return {f"grids/{name}.png": sheet(name, found) for name, found in groups.items() if found}


def sheet(name: str, images: Sequence[GeneratedImage]) -> bytes:
    """A PNG of the generated images, beside each the training image that is nearest to it."""
    tiles = []
    for generated in images:
        left, right = (from_png(png) for png in (generated.png, generated.nearest_png))
        width, height = left.size
        both = Image.new("RGB", (2 * width, height))
        both.paste(left, (0, 0))
        both.paste(right.resize(left.size, Image.Resampling.NEAREST), (width, 0))
        score = f" · {generated.score:.3g}" if generated.score is not None else ""
        tiles.append(Tile(both, f"{generated.prompt}{score}"))
    note = "Left what was generated, right the training image that it comes nearest to."
    return png_bytes(grid([Group(name.replace("-", ", ").capitalize(), tiles, note)], columns=6, side=160))


def data_uri(png: bytes) -> str:
    """The PNG as a URI that a page can hold."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _generated(entry: PromptEntry | SampleEntry, directory: Path, originals: dict[str, bytes]) -> GeneratedImage:
    return GeneratedImage(
        prompt=visible(entry["prompt"]),
        png=(directory / entry["file"]).read_bytes(),
        nearest_png=originals[entry["key"]],
        nearest_caption=visible(entry["caption"]),
        distance=entry["distance"],
        score=entry.get("score"),
    )


def _reconstruction(entry: ReconstructionEntry, directory: Path, originals: dict[str, bytes]) -> Reconstruction:
    return Reconstruction(
        caption=visible(entry["caption"] or entry["key"]),
        unseen=entry["split"] == "val",
        psnr=entry["psnr"],
        original_png=originals[entry["key"]],
        png=(directory / entry["file"]).read_bytes(),
    )


def _real_images(prepare: Path, results: Results) -> dict[str, bytes]:
    """The prepared images that the results name, by key, as PNGs."""
    shown = (*results["nearest"], *results["samples"], *results["reconstructions"])
    keys = {entry["key"] for entry in shown}
    found: dict[str, bytes] = {}
    for split in sorted({"train", *(entry["split"] for entry in results["reconstructions"])}):
        catalog = Catalog(prepare, split)
        rows = sorted(catalog.rows_of(keys - found.keys()).values())
        found |= {sample.key: sample.png for sample in catalog.samples(rows)}
    return found
