"""The judge: reads the things of an image back from its pixels, and compares them with what a caption asks for.

Connected components on white; of each its color (the palette's nearest to the median of its inside), its shape (the
template that covers its square most alike) and its size. No network, and nothing learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from pipeline.shapes.drawing import template
from pipeline.shapes.prompts import TASKS, Prompt, Wanted, read
from pipeline.shapes.scene import COLORS, SHAPES, SIZES, Thing, stands

SMALLEST_SIDE = 48  # pixels of an image; in smaller ones small shapes cannot be told apart
UNKNOWN = "unknown"
_INK = 0.3  # how far from white a pixel is that belongs to a thing: largest difference of a channel, in 0…1
_INK_COVERS = 0.35  # the coverage by a color of the palette that this is
_BLURS = (0.0, 0.7, 1.2, 1.7)  # pixels: a tokenizer draws no sharp edges
_MARGIN = 8  # pixels around a template, for its blur
_SPECK = 0.15  # of the square of the smallest thing: what covers less is dirt
_SIDE = 24  # of the square in which shapes are compared
_UNLIKE = 0.2  # mean difference of coverage above which it is none of the shapes
_OFF_COLOR = 0.35  # distance in RGB (each in 0…1) above which it is none of the colors
_MIDDLE = (SIZES["small"] * SIZES["large"]) ** 0.5
Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Verdict:
    """Whether an image shows what its prompt says; `why` not, in words, else empty."""

    task: str
    right: bool
    why: str = ""


def judge(image: Image.Image, caption: str) -> Verdict:
    """Whether the image shows exactly what the caption asks for.

    Raises:
        UserError: the caption is not of the grammar.
    """
    prompt = read(caption)
    why = _mismatch(see(image), prompt)
    return Verdict(prompt.task, not why, why)


def see(image: Image.Image) -> list[Thing]:
    """The things of an image, from the top; shape or color is UNKNOWN where it is none of the world's."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    ink = (1 - pixels).max(axis=2)
    labels, _ = ndimage.label(ink > _INK, structure=np.ones((3, 3)))
    smallest = _SPECK * (SIZES["small"] * min(image.size)) ** 2
    found = []
    for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, columns] == index
        if inside.sum() >= smallest:
            found.append(_thing(pixels[rows, columns], inside, (columns, rows), image.size))
    return sorted(found, key=lambda thing: (thing.y, thing.x))


def scores(pairs: Iterable[tuple[Image.Image, str]]) -> dict[str, float]:
    """Of images and their captions, the share of right ones by task, and "overall", the mean of the tasks."""
    asked, right = Counter[str](), Counter[str]()
    for image, caption in pairs:
        verdict = judge(image, caption)
        asked[verdict.task] += 1
        right[verdict.task] += verdict.right
    shares = {task: right[task] / asked[task] for task in TASKS if asked[task]}
    return shares | {"overall": sum(shares.values()) / len(shares)} if shares else {}


def _thing(pixels: Pixels, inside: npt.NDArray[np.bool_], where: tuple[slice, slice], size: tuple[int, int]) -> Thing:
    """`pixels` [h, w, 3] and `inside` [h, w] of the square around it; `where` that lies, as (columns, rows)."""
    core = ndimage.binary_erosion(inside)
    color = np.median(pixels[core if core.any() else inside], axis=0)
    spans = [(part.start, part.stop) for part in where]
    x, y = ((start + stop) / 2 / whole for (start, stop), whole in zip(spans, size, strict=True))
    extent = max(stop - start for start, stop in spans) / min(size)
    size_name = "small" if extent < _MIDDLE else "large"
    shape = _shape(pixels, inside, color, round(SIZES[size_name] * min(size)))
    return Thing(shape, _color(color), size_name, x, y)


def _color(color: Pixels) -> str:
    distances = {name: float(np.linalg.norm(color - np.array(rgb) / 255)) for name, rgb in COLORS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= _OFF_COLOR else UNKNOWN


def _shape(pixels: Pixels, inside: npt.NDArray[np.bool_], color: Pixels, extent: int) -> str:
    """By how much of each pixel is covered. `extent`: the side of the square around it in pixels, if it were sharp."""
    # How far a pixel is from white, over how far the color is.
    coverage = ((1 - pixels) @ (1 - color)) / max(float((1 - color) @ (1 - color)), 1e-6)
    coverage = np.clip(coverage, 0, 1) * ndimage.binary_dilation(inside)
    seen = _squared(coverage.astype(np.float32))
    unlike = {
        shape: min(float(np.abs(seen - _blurred(shape, extent, sigma)).mean()) for sigma in _BLURS) for shape in SHAPES
    }
    nearest = min(unlike, key=unlike.__getitem__)
    return nearest if unlike[nearest] <= _UNLIKE else UNKNOWN


@lru_cache
def _blurred(shape: str, extent: int, sigma: float) -> Pixels:
    """The coverage of a shape that is `extent` pixels wide, blurred and cut out as it would be found."""
    coverage = ndimage.gaussian_filter(np.pad(template(shape, extent), _MARGIN), sigma)
    rows, columns = ndimage.find_objects((coverage > _INK_COVERS).astype(int))[0]
    return _squared(coverage[rows, columns])


def _squared(coverage: Pixels) -> Pixels:
    """Resized to a square of `_SIDE` pixels."""
    return np.asarray(Image.fromarray(coverage).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))


def _mismatch(things: list[Thing], prompt: Prompt) -> str:
    """Why the things are not what is asked for; empty if they are."""
    for wanted in prompt.things:
        number = sum(_fits(thing, wanted) for thing in things)
        if number != wanted.number:
            return f"expected {wanted.number} of {_words(wanted)}, found {number}"
    total = sum(wanted.number for wanted in prompt.things)
    if len(things) != total:
        return f"expected {total} things, found {len(things)}"
    if prompt.relation:
        first, second = (next(t for t in things if _fits(t, wanted)) for wanted in prompt.things)
        if not stands(first, prompt.relation, second):
            return f"expected {first.shape} {prompt.relation} {second.shape}"
    return ""


def _fits(thing: Thing, wanted: Wanted) -> bool:
    asked = ((wanted.shape, thing.shape), (wanted.color, thing.color), (wanted.size, thing.size))
    return all(want in (None, seen) for want, seen in asked)


def _words(wanted: Wanted) -> str:
    return " ".join(word for word in (wanted.size, wanted.color, wanted.shape) if word)
