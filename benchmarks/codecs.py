"""Which libraries and formats `prepare` stores images with: CPU time, bytes and loss, by turns in one process.

    python -m benchmarks.codecs formats FOLDER-OF-PHOTOGRAPHS
    python -m benchmarks.codecs prepare FOLDER-OF-PHOTOGRAPHS
    python -m benchmarks.codecs memory FOLDER-OF-PHOTOGRAPHS
    python -m benchmarks.codecs tokenizers FOLDER-OF-PHOTOGRAPHS

The photographs become JPEGs of 512 pixels, quality 90, as img2dataset writes them; these become images of 256 pixels.
Libraries that are not installed are left out: `pip install simplejpeg PyTurboJPEG imagecodecs 'pyvips[binary]'
opencv-python-headless`.
"""

from __future__ import annotations

import importlib
import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.prepare import PrepareConfig, Storage
from pipeline.data import png
from pipeline.data.prepare import prepare_share

Pixels = NDArray[np.uint8]
Item = TypeVar("Item")

FROM, TO, QUALITY = 512, 256, 95
CROPS = 4  # of each photograph


@click.group()
def main() -> None:
    """Measure what images are stored with."""


@main.command("prepare")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=3, show_default=True)
def prepare_images(folder: Path, rounds: int) -> None:
    """The parts of the stage, without what it does once for all, by one worker; a tar of the photographs in FOLDER."""
    crops = _jpegs(folder) * 3
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _write_tar(work / "0.tar", crops)
        spent: dict[str, list[float]] = {storage: [] for storage in get_args(Storage)}
        size: dict[str, int] = {}
        for turn in range(rounds):
            for storage, times in spent.items():
                source = {"kind": "webdataset", "urls": str(work / "0.tar")}
                values = {"source": source, "image_size": TO, "storage": storage, "workers": 1}
                begun = time.process_time()
                out = work / f"{storage}{turn}"
                prepare_share(out, PrepareConfig.model_validate(values), 0, lambda parts: parts)
                times.append(time.process_time() - begun)
                size[storage] = sum(path.stat().st_size for path in out.glob("*/*.tar"))
    before = statistics.median(spent["png"])
    print(
        f"| `prepare.storage` | images per CPU second ({FROM} px JPEG -> {TO} px) | | kB an image |\n|---|---|---|---|"
    )
    for storage, times in spent.items():
        median, kilobytes = statistics.median(times), size[storage] / len(crops) / 1e3
        print(f"| {storage} | {len(crops) / median:.0f} | {before / median:.1f} x | {kilobytes:.0f} |")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=10_000, show_default=True)
def memory(folder: Path, images: int) -> None:
    """The peak memory of this process, which makes one part of IMAGES images, stored as JPEGs."""
    with tempfile.TemporaryDirectory() as name:
        work, crops = Path(name), _jpegs(folder)
        _write_tar(work / "0.tar", (crops[number % len(crops)] for number in range(images)))
        del crops
        source = {"kind": "webdataset", "urls": str(work / "0.tar")}
        values = {"source": source, "image_size": TO, "storage": "jpeg", "workers": 1}
        before = memory_mb("VmHWM")
        prepare_share(work / "out", PrepareConfig.model_validate(values), 0, lambda parts: parts)
        size = sum(path.stat().st_size for path in work.glob("out/*/*.tar")) / 1e6
    most = memory_mb("VmHWM")
    print(f"{images:,} images, {size:,.0f} MB of shards: {most:,.0f} MB at most, {before:,.0f} MB at the start")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--rounds", default=5, show_default=True)
def formats(folder: Path, rounds: int) -> None:
    """Libraries that decode, and formats to store, side by side."""
    large = [crop for path in sorted(folder.iterdir()) for crop in random_crops(path)]
    sources = [_pillow(crop, "JPEG", quality=90) for crop in large]
    small = [crop.resize((TO, TO), Image.Resampling.LANCZOS) for crop in large]
    print(f"{len(large)} photographs, {np.mean([len(source) for source in sources]) / 1e3:.0f} kB each\n")
    print(f"| {FROM} px JPEG -> {TO} px | ms | dB to a full decode and Lanczos |\n|---|---|---|")
    decoders = {name: step for name, step in DECODERS.items() if _works(step, sources[0])}
    times = _by_turns(decoders, sources, rounds)
    for name, step in decoders.items():
        loss = np.mean([_psnr(step(source), np.asarray(exact)) for source, exact in zip(sources, small, strict=True)])
        print(f"| {name} | {times[name]:.2f} | {'the same' if np.isinf(loss) else f'{loss:.1f}'} |", flush=True)
    print(f"\n| {TO} px, stored as | encode ms | decode ms | kB | dB |\n|---|---|---|---|---|")
    for name, (encode, decode) in FORMATS.items():
        arrays = [np.asarray(image) for image in small]
        if not _works(encode, small[0]):
            continue
        stored = [encode(image) for image in small]
        spent = _by_turns({"encode": encode}, small, rounds) | _by_turns({"decode": decode}, stored, rounds)
        loss = np.mean([_psnr(decode(content), array) for content, array in zip(stored, arrays, strict=True)])
        size = np.mean([len(content) for content in stored]) / 1e3
        told = "exact" if np.isinf(loss) else f"{loss:.1f}"
        print(f"| {name} | {spent['encode']:.2f} | {spent['decode']:.2f} | {size:.1f} | {told} |", flush=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--crops", default=40, show_default=True, help="of each photograph")
@click.option("--steps", default=1_000, show_default=True, help="of 16 tiles")
@click.option("--seeds", default=2, show_default=True)
def tokenizers(folder: Path, crops: int, steps: int, seeds: int) -> None:
    """Train a small tokenizer on what each format makes of the images; validate on others, as they were made.

    It learns from tiles of 32 pixels, which is what a code of a convolutional tokenizer sees of an image.
    """
    from benchmarks.tokenizers import train

    made: dict[bool, list[Image.Image]] = {True: [], False: []}
    for number, path in enumerate(sorted(folder.iterdir())):
        held_out = number % 5 == 4
        cut = random_crops(path, crops)
        made[held_out] += [crop.resize((TO, TO), Image.Resampling.LANCZOS) for crop in cut]
    validation = _tiles(np.asarray(image) for image in made[True])
    print(f"{len(made[False])} images to learn from, {len(validation):,} tiles of {len(made[True])} others\n")
    print("| stored as | kB | decode ms | PSNR of the tokenizer, dB, of each seed |\n|---|---|---|---|")
    for name in LEARNED_FROM:
        encode, decode = FORMATS[name]
        stored = [encode(image) for image in made[False]]
        begun = time.process_time()
        read = [np.asarray(decode(content)) for content in stored]
        spent = 1e3 * (time.process_time() - begun) / len(stored)
        tiles = _tiles(pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels for pixels in read)
        lines = [train("ema", seed, 1, steps, 1, "adamw", (tiles, validation)) for seed in range(seeds)]
        size = np.mean([len(content) for content in stored]) / 1e3
        told = ", ".join(f"{line['psnr']:.2f}" for line in lines)
        print(f"| {name} | {size:.1f} | {spent:.2f} | {told} |", flush=True)


def _tiles(images: Iterable[Pixels], side: int = 32) -> Any:
    """Images [side of a multiple of `side`, …, 3] in tiles: uint8 [n, 3, side, side], a tensor."""
    import torch

    count = TO // side
    tiles = [image.reshape(count, side, count, side, 3).transpose(0, 2, 4, 1, 3) for image in images]
    return torch.from_numpy(np.concatenate([own.reshape(-1, 3, side, side) for own in tiles]))


def _jpegs(folder: Path) -> list[bytes]:
    return [_pillow(crop, "JPEG", quality=90) for path in sorted(folder.iterdir()) for crop in random_crops(path)]


def _write_tar(path: Path, images: Iterable[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(images):
            for extension, member in (("jpg", content), ("txt", b"a photograph")):
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))


def memory_mb(name: str) -> float:
    """Of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) / 1e3


def random_crops(path: Path, count: int = CROPS) -> list[Image.Image]:
    image = Image.open(path, formats=("PNG", "JPEG", "WEBP")).convert("RGB")
    scale = max(1.0, FROM * 1.1 / min(image.size))
    if scale > 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    rng = np.random.default_rng(len(path.name))
    room = (image.width - FROM + 1, image.height - FROM + 1)
    places = rng.integers(0, room, (count, 2)).tolist()
    return [image.crop((left, top, left + FROM, top + FROM)) for left, top in places]


def _works(step: Callable[..., object], item: object) -> bool:
    try:
        step(item)
    except ImportError:
        return False
    return True


def _by_turns(steps: Mapping[str, Callable[[Item], object]], items: list[Item], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU of each step an item: the median of rounds, in each of which all take their turn."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begun = time.process_time()
            for item in items:
                step(item)
            spent[name].append(1e3 * (time.process_time() - begun) / len(items))
    return {name: statistics.median(times) for name, times in spent.items()}


def _psnr(found: object, exact: Pixels) -> float:
    pixels = np.asarray(found)
    if pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    error = float(((pixels.astype(np.float64) - exact) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")


def _pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _full(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")).convert("RGB")


def _lanczos(content: bytes) -> Image.Image:
    return _full(content).resize((TO, TO), Image.Resampling.LANCZOS)


def _draft(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP"))
    image.draft("RGB", (TO, TO))
    return image.convert("RGB").resize((TO, TO), Image.Resampling.LANCZOS)


def _draft_of_more(content: bytes) -> Image.Image:
    return _full(content).resize((TO, TO), Image.Resampling.LANCZOS, reducing_gap=2.0)


def _simplejpeg(content: bytes) -> Pixels:
    pixels: Pixels = importlib.import_module("simplejpeg").decode_jpeg(content, min_height=TO, min_width=TO)
    return pixels


def _simplejpeg_fast(content: bytes) -> Pixels:
    decode = importlib.import_module("simplejpeg").decode_jpeg
    pixels: Pixels = decode(content, min_height=TO, min_width=TO, fastdct=True, fastupsample=True)
    return pixels


def _simplejpeg_full(content: bytes) -> Image.Image:
    pixels = importlib.import_module("simplejpeg").decode_jpeg(content)
    return Image.fromarray(pixels).resize((TO, TO), Image.Resampling.LANCZOS)


@cache
def _turbo() -> Any:
    try:
        return importlib.import_module("turbojpeg").TurboJPEG()
    except RuntimeError as error:  # the wheel brings no libturbojpeg
        raise ImportError("libturbojpeg") from error


def _turbojpeg(content: bytes) -> Pixels:
    library = importlib.import_module("turbojpeg")
    pixels: Pixels = _turbo().decode(content, pixel_format=library.TJPF_RGB, scaling_factor=(1, 2))
    return pixels


def _imagecodecs_full(content: bytes) -> Image.Image:
    pixels = importlib.import_module("imagecodecs").jpeg8_decode(content)
    return Image.fromarray(pixels).resize((TO, TO), Image.Resampling.LANCZOS)


def _vips(content: bytes) -> Pixels:
    image = importlib.import_module("pyvips").Image.thumbnail_buffer(content, TO, height=TO)
    pixels: Pixels = image.numpy()
    return pixels


def _opencv(content: bytes) -> Pixels:
    cv2 = importlib.import_module("cv2")
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    resized: Pixels = cv2.resize(pixels, (TO, TO), interpolation=cv2.INTER_AREA)
    return resized


def _opencv_reduced(content: bytes) -> Pixels:
    cv2 = importlib.import_module("cv2")
    pixels: Pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
    return pixels[:, :, ::-1]


def _simple_encode(image: Image.Image) -> bytes:
    encode = importlib.import_module("simplejpeg").encode_jpeg
    content: bytes = encode(np.asarray(image), quality=QUALITY, colorsubsampling="444")
    return content


def _simple_decode(content: bytes) -> Pixels:
    pixels: Pixels = importlib.import_module("simplejpeg").decode_jpeg(content)
    return pixels


def _jpeg(quality: int, subsampling: int) -> tuple[Callable[[Image.Image], bytes], Callable[[bytes], object]]:
    return lambda image: _pillow(image, "JPEG", quality=quality, subsampling=subsampling), _decoded


def _webp(**options: object) -> tuple[Callable[[Image.Image], bytes], Callable[[bytes], object]]:
    return lambda image: _pillow(image, "WEBP", **options), _decoded


def _decoded(content: bytes) -> Pixels:
    return np.asarray(_full(content))


DECODERS: dict[str, Callable[[bytes], object]] = {
    "Pillow, whole, Lanczos (`storage: png`)": _lanczos,
    "Pillow, whole, Lanczos with reducing_gap=2": _draft_of_more,
    "Pillow, scaled decoding (`draft`)": _draft,
    "simplejpeg, whole, Pillow's Lanczos": _simplejpeg_full,
    "simplejpeg, scaled decoding": _simplejpeg,
    "simplejpeg, scaled decoding, fast DCT": _simplejpeg_fast,
    "PyTurboJPEG, scaled decoding": _turbojpeg,
    "imagecodecs, whole, Pillow's Lanczos": _imagecodecs_full,
    "pyvips, thumbnail": _vips,
    "OpenCV, whole, area": _opencv,
    "OpenCV, scaled decoding": _opencv_reduced,
}

FORMATS: dict[str, tuple[Callable[[Image.Image], bytes], Callable[[bytes], object]]] = {
    "png (ours)": (png.encode, png.decode),
    "png, Pillow, level 6": (lambda image: _pillow(image, "PNG"), _decoded),
    "webp, lossless, method 0": _webp(lossless=True, method=0, quality=0),
    "webp, lossless, method 4": _webp(lossless=True, method=4),
    "webp, quality 95, method 0": _webp(quality=95, method=0),
    "webp, quality 95, method 4": _webp(quality=95, method=4),
    "jpeg, quality 95, 4:4:4": _jpeg(95, 0),
    "jpeg, quality 95, 4:4:4, simplejpeg": (_simple_encode, _simple_decode),
    "jpeg, quality 90, 4:4:4": _jpeg(90, 0),
    "jpeg, quality 95, 4:2:0": _jpeg(95, 2),
    "jpeg, quality 75, 4:4:4": _jpeg(75, 0),
}
LEARNED_FROM = [
    "webp, lossless, method 0",  # the pixels of png
    "webp, quality 95, method 4",
    "jpeg, quality 95, 4:4:4",
    "jpeg, quality 90, 4:4:4",
    "jpeg, quality 95, 4:2:0",
    "jpeg, quality 75, 4:4:4",
]

if __name__ == "__main__":
    main()
