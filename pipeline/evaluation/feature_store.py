"""Features on disk, under the hash of what they are features of: the images' bytes, the weights, the resize rule.

    store = FeatureStore(folder, extractor)
    store.extract(images, which=rank, of=ranks)       # this rank's share, where it is not there yet
    features = store.features(images)                 # the rest, and all of them as one memory-mapped set

    <folder>/<hash>/about.json features.npy [logits.npy spatial.npy] keys.txt     a finished set
    <folder>/<hash>/part-00003.npz                                    1,024 images of one in the making

Parts are written atomically, so a killed extraction resumes where it was; a set that was seen before, in whichever
run, costs the reading of its images. A finished folder is a feature file of its own (`read_features`). `trim` keeps
the folder within a bound: what was not used for longest goes first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core.atomic_io import atomic_path, read_json, write_atomic, write_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import first_fault, record
from pipeline.evaluation.evaluator_npz import has_images, has_statistics
from pipeline.evaluation.image_sets import FileSlice, StoredImage
from pipeline.extractors.base import Extractor, ExtractorInfo, FeatureSet

log = logging.getLogger(__name__)

_FORMAT = "smalti features 3"  # 1: images decoded in another way than by `prepare`; 2: on GPUs in TF32
PART = 1024  # images
_IDLE_S = 6 * 3600  # what was used since then is never trimmed: another process may be at it


@dataclass
class _Read:
    """What the bytes of a set of images say."""

    directory: Path  # of its features
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    repeats: list[tuple[StoredImage, StoredImage]] = field(default_factory=list)


class FeatureStore:
    """The features of one extractor in a folder that many processes, extractors and runs may share."""

    def __init__(self, folder: Path, extractor: Extractor) -> None:
        self.folder, self.extractor = folder, extractor
        self._seen: dict[tuple[FileSlice, ...], _Read] = {}

    def directory(self, images: Sequence[StoredImage]) -> Path:
        """The folder where the features of these images, in this order, are or will be."""
        return self._read(images).directory

    def sizes(self, images: Sequence[StoredImage]) -> Counter[tuple[int, int]]:
        """How many images there are of each width and height. Raises UserError at what is no image."""
        return self._read(images).sizes

    def repeats(self, images: Sequence[StoredImage]) -> list[tuple[StoredImage, StoredImage]]:
        """Each image whose file has the bytes of one before, and that one."""
        return self._read(images).repeats

    def _read(self, images: Sequence[StoredImage]) -> _Read:
        """What all bytes of all images, which are read once per process, say."""
        slices = tuple(image.slice for image in images)
        if slices not in self._seen:
            digest, found = hashlib.sha256(_FORMAT.encode()), _Read(self.folder)
            first: dict[bytes, StoredImage] = {}
            for value in asdict(self.extractor.info).values():
                digest.update(f"\n{value}".encode())
            if self.extractor.has_spatial:  # sets of before have none
                digest.update(b"\nspatial")
            for image in images:
                content = image.content()
                of_this_one = hashlib.sha256(content).digest()
                digest.update(of_this_one)
                found.sizes[image.size(content)] += 1
                if (original := first.setdefault(of_this_one, image)) is not image:
                    found.repeats.append((image, original))
            found.directory = self.folder / digest.hexdigest()[:32]
            self._seen[slices] = found
        return self._seen[slices]

    def extract(
        self,
        images: Sequence[StoredImage],
        which: int = 0,
        of: int = 1,
        description: str = "features",
        on_part: Callable[[], object] = lambda: None,
    ) -> Path:
        """Features of the parts `which`, `which` + `of`, … that are not there yet. Returns the set's folder.

        Args:
            on_part: called after each of these parts, also of those that are there already.
        """
        if not images:
            raise UserError(f"{description}: expected images, found none")
        directory = self.directory(images)
        share = range(which, _parts(images), of)
        missing = {part for part in share if not _part_path(directory, part).is_file()}
        if (directory / "about.json").is_file():
            os.utime(directory / "about.json")  # for trim
            missing.clear()
        for part in share:
            if part in missing:
                chunk = images[part * PART : (part + 1) * PART]
                found = self.extractor((image.image for image in chunk), len(chunk), description)
                _write_npz(_part_path(directory, part), _arrays(found))
            on_part()
        return directory

    def features(self, images: Sequence[StoredImage], description: str = "features") -> FeatureSet:
        """The features of all images, extracted where they are not there yet."""
        directory = self.extract(images, description=description)
        if not (directory / "about.json").is_file():
            self._join(directory, images)
        return read_features(directory)

    def _join(self, directory: Path, images: Sequence[StoredImage]) -> None:
        try:
            names = _names(directory)
            for name in names:
                _write_rows(directory / f"{name}.npy", len(images), _rows(directory, name, _parts(images)))
        except FileNotFoundError:
            if (directory / "about.json").is_file():  # another process was quicker, and has cleaned up
                return
            raise
        write_atomic(directory / "keys.txt", "".join(f"{image.key}\n" for image in images))
        files = {f"{name}.npy": record(directory / f"{name}.npy") for name in names}
        write_json(directory / "about.json", {"images": len(images), **asdict(self.extractor.info), "files": files})
        for part in range(_parts(images)):
            with suppress(FileNotFoundError):
                _part_path(directory, part).unlink()


def trim(folder: Path, limit_gb: float) -> None:
    """Remove what was not used for longest until `folder` holds at most `limit_gb`; nothing of the last six hours."""
    used: dict[Path, float] = {}
    sizes: dict[Path, int] = {}
    for file in folder.glob("*/*"):
        entry = file if file.parent.name == "statistics" else file.parent
        if not re.fullmatch("[0-9a-f]{32}", entry.stem):  # somebody else's
            continue
        with suppress(FileNotFoundError):  # another process trims, too
            status = file.stat()
            used[entry] = max(used.get(entry, 0.0), status.st_mtime)
            sizes[entry] = sizes.get(entry, 0) + status.st_size
    excess, removed = sum(sizes.values()) - limit_gb * 1e9, 0
    for entry in sorted(used, key=lambda entry: used[entry]):
        if excess <= 0 or time.time() - used[entry] < _IDLE_S:
            break
        shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        excess -= sizes[entry]
        removed += 1
    if removed:
        log.info("%s: removed %d sets of features, to keep within %g GB", folder, removed, limit_gb)


def read_features(path: Path) -> FeatureSet:
    """A finished folder of a store, memory-mapped; or an .npz with `features`, and perhaps `logits` and `spatial`.

    An .npz may name its extractor, its weights' hash and its resize rule: `name`, `weights_sha256`, `resize`.

    Raises:
        UserError: it is something else, or damaged.
    """
    try:
        arrays, about = _read_folder(path) if path.is_dir() else _read_npz(path)
    except UserError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise some ten kinds at damaged files
        raise UserError(f"{path}: expected a feature file with an array `features`, found none ({error})") from error
    rows = about.get("images", len(arrays.get("features", [])))
    if "features" not in arrays or any(len(array) != rows for array in arrays.values()):
        found = {name: array.shape for name, array in arrays.items()}
        raise UserError(f"{path}: expected {rows} rows of features, found {found}; remove it, and extract again")
    name = about.get("name", "unknown extractor")
    info = ExtractorInfo(
        name, about.get("label", name), about.get("weights_sha256", "unknown"), about.get("resize", "unknown")
    )
    others = (torch.from_numpy(arrays[name]) if name in arrays else None for name in ("logits", "spatial"))
    return FeatureSet(torch.from_numpy(arrays["features"]), next(others), info, next(others))


def _read_folder(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, memory-mapped, and about.json, which records their files."""
    about: dict[str, Any] = read_json(path / "about.json")
    if fault := first_fault(path, about.get("files", {}), hashed=False):
        raise UserError(f"{fault}: remove {path}, and extract again")
    return {file.stem: np.load(file, mmap_mode="c") for file in sorted(path.glob("*.npy"))}, about


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and what the file says of itself: its strings by name."""
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files if content[name].ndim == 2}
        about = {name: str(content[name]) for name in content.files if content[name].ndim == 0}
    if "features" not in arrays:
        raise KeyError("features")
    return arrays, about


def is_feature_file(path: Path) -> bool:
    """Whether `read_features` reads it: an .npz without images or statistics, or a finished folder of a store."""
    if path.suffix == ".npz":
        return not (has_images(path) or has_statistics(path))
    return (path / "about.json").is_file()


def save_features(features: FeatureSet, path: Path) -> None:
    """Write an .npz that `read_features` reads."""
    about = {name: np.array(value) for name, value in asdict(features.info).items()}
    _write_npz(path, _arrays(features) | about)


def check_same_extractor(real: FeatureSet, generated: FeatureSet) -> None:
    """Raises UserError if the sets were made by different extractors, weights or resize rules."""
    for name in ("name", "weights_sha256", "resize"):
        a, b = getattr(real.info, name), getattr(generated.info, name)
        if a != b:
            raise UserError(
                f"features of different extractors cannot be compared: expected one {name}, found '{a}' (real) and "
                f"'{b}' (generated); extract both anew with one extractor"
            )


def _parts(images: Sequence[StoredImage]) -> int:
    return -(-len(images) // PART)


def _part_path(directory: Path, part: int) -> Path:
    return directory / f"part-{part:05d}.npz"


def _names(directory: Path) -> list[str]:
    with np.load(_part_path(directory, 0)) as part:
        return sorted(part.files)


def _arrays(features: FeatureSet) -> dict[str, np.ndarray]:
    found = {"features": features.features, "logits": features.logits, "spatial": features.spatial}
    return {name: values.numpy() for name, values in found.items() if values is not None}


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _rows(directory: Path, name: str, parts: int) -> Iterator[np.ndarray]:
    for part in range(parts):
        with np.load(_part_path(directory, part)) as content:
            yield content[name]


def _write_rows(path: Path, rows: int, blocks: Iterator[np.ndarray]) -> None:
    """Write an .npy of `rows` rows, a block at a time."""
    with atomic_path(path) as temporary:
        first = next(blocks)
        target = np.lib.format.open_memmap(temporary, mode="w+", dtype=first.dtype, shape=(rows, first.shape[1]))
        target[: len(first)] = first
        start = len(first)
        for block in blocks:
            target[start : start + len(block)] = block
            start += len(block)
        target.flush()
        del target
