"""The `.npz` of guided-diffusion's evaluator (Dhariwal & Nichol 2021): samples, or statistics of a reference, or both.

    arr_0              uint8 [n, h, w, 3]: RGB images
    arr_1              int64 [n]: of samples of classes, the class of each, from 0 on; the evaluator does not read it
    mu, sigma          mean [d] and covariance [d, d] of Inception's features
    mu_s, sigma_s      the same of its spatial features, for sFID

Nothing is unpickled, and what a header promises is held against the file before any of it is read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from pipeline.core.atomic_io import atomic_path
from pipeline.core.errors import UserError
from pipeline.metrics.frechet import Gaussian

IMAGES, LABELS = "arr_0", "arr_1"
_LARGEST_DIMENSIONS = 16_384  # a covariance of so many is 2 GB
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name and extra field


@dataclass(frozen=True)
class Layout:
    """Where the images of a file lie: n of height × width × 3 bytes, from `offset` on."""

    n: int
    height: int
    width: int
    offset: int

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.height * self.width * 3


@dataclass(frozen=True)
class Statistics:
    """What a reference file says of its images' features."""

    features: Gaussian
    spatial: Gaussian | None
    where: str  # for messages


@dataclass(frozen=True)
class _Member:
    """An array in the file, by its header."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool
    offset: int  # of its values, from the member's beginning
    info: zipfile.ZipInfo


def array_names(path: Path) -> set[str]:
    """Names of the arrays in an .npz; none for what is no zip. Raises UserError where the file cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except zipfile.BadZipFile:
        return set()
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be read, found: {error.strerror}") from error


def has_images(path: Path) -> bool:
    """Whether it is an .npz with images."""
    return path.suffix == ".npz" and path.is_file() and IMAGES in array_names(path)


def has_statistics(path: Path) -> bool:
    """Whether it is an .npz with statistics of features."""
    return path.suffix == ".npz" and path.is_file() and {"mu", "sigma"} <= array_names(path)


def image_layout(path: Path) -> Layout:
    """Where the images of the file are.

    Raises:
        UserError: `arr_0` is no uint8 [n, h, w, 3], is compressed, or ends before its last image.
    """
    with _opened(path) as archive:
        member = _member(path, archive, IMAGES)
    wanted = "uint8 [n, h, w, 3] in C order, as np.savez writes it"
    if member.dtype != np.uint8 or len(member.shape) != 4 or member.shape[3] != 3 or member.fortran:
        raise UserError(f"{path}: expected {IMAGES} as {wanted}, found {member.dtype} {list(member.shape)}")
    if member.info.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path}: expected {IMAGES} uncompressed, found it compressed: write it with np.savez")
    if 0 in member.shape:
        raise UserError(f"{path}: expected images in {IMAGES}, found {list(member.shape)}")
    n, height, width, _ = member.shape
    with open(path, "rb") as file:
        file.seek(member.info.header_offset)
        header = file.read(_LOCAL_HEADER)
        size = file.seek(0, 2)
    start = member.info.header_offset + _LOCAL_HEADER
    start += int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little") + member.offset
    layout = Layout(n, height, width, start)
    if start + n * layout.image_bytes > size:
        raise UserError(f"{path}: expected {n:,} images of {height} × {width}, found an end before the last one")
    return layout


def read_statistics(path: Path) -> Statistics:
    """The statistics of a reference file.

    Raises:
        UserError: other shapes or types than the evaluator's, numbers that are not finite, or a damaged file.
    """
    with _opened(path) as archive:
        features = _gaussian(path, archive, "mu", "sigma")
        spatial = _gaussian(path, archive, "mu_s", "sigma_s") if "mu_s.npy" in archive.namelist() else None
    return Statistics(features, spatial, str(path))


def write_images(path: Path, images: Iterable[Image.Image], n: int, labels: Sequence[int] | None = None) -> None:
    """Write `n` RGB images of one size as `arr_0`, one at a time, and `labels`, if there are any, as `arr_1`.

    Raises:
        UserError: their sizes differ.
    """
    size: tuple[int, int] | None = None
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(f"{IMAGES}.npy"), "w", force_zip64=True) as file:
            for image in images:
                if size is None:
                    size = image.size
                    shape = (n, size[1], size[0], 3)
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                if image.size != size:
                    raise UserError(f"{path}: expected images of one size, found {size} and {image.size} pixels")
                file.write(image.convert("RGB").tobytes())
        if labels is not None:
            with archive.open(zipfile.ZipInfo(f"{LABELS}.npy"), "w") as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64))


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: expected an .npz file, found something else or a damaged one ({error})") from error


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> _Member:
    """The header of an array, whose values must have just the bytes that the archive says."""
    try:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as file:
            shape, fortran, dtype = _header(file)
            offset = file.tell()
    except KeyError as error:
        raise UserError(f"{path}: expected an array {name}, found none") from error
    except Exception as error:  # numpy, zipfile and zlib raise some ten kinds at damaged files
        raise UserError(f"{path}: expected an array {name}, found a damaged one ({error})") from error
    promised = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    if dtype.hasobject or min(shape, default=0) < 0 or promised != info.file_size:
        raise UserError(
            f"{path}: expected {promised:,} bytes of {name} ({dtype} {list(shape)}), found {info.file_size:,}"
        )
    return _Member(shape, dtype, fortran, offset, info)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _gaussian(path: Path, archive: zipfile.ZipFile, mean: str, covariance: str) -> Gaussian:
    d = (_member(path, archive, mean).shape or (0,))[0]
    if not 0 < d <= _LARGEST_DIMENSIONS:
        raise UserError(f"{path}: expected 1 to {_LARGEST_DIMENSIONS:,} dimensions of {mean}, found {d:,}")
    found = []
    for name, shape in ((mean, (d,)), (covariance, (d, d))):
        member = _member(path, archive, name)
        if member.shape != shape or member.dtype.kind != "f":
            raise UserError(
                f"{path}: expected {name} as floats {list(shape)}, found {member.dtype} {list(member.shape)}"
            )
        found.append(torch.from_numpy(_values(path, archive, name).astype(np.float64)))
        if not found[-1].isfinite().all():
            raise UserError(f"{path}: expected finite numbers in {name}, found NaN or infinity; make it anew")
    return Gaussian.of_moments(found[0], found[1])


def _values(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # as above
        raise UserError(f"{path}: expected an array {name}, found a damaged one ({error})") from error
