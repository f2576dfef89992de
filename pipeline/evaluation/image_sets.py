"""Images by name, of a folder of images and tars (WebDataset: KEY.png, KEY.txt …), one tar, `.npz` or image file.

    found = read_set(path)
    found.images            every image there, in folders below it and in tars
    found.left_out          every other file there, with the reason; captions (.txt, .json) of images are no others

A `StoredImage` knows where its bytes are, and reads them when asked: a few hundred bytes per image, whatever its size.
Images are decoded as `prepare` decodes them (`data/images.py`).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.core.text import decode_text, visible
from pipeline.data.catalog import Catalog
from pipeline.data.images import EXTENSIONS, BadSample, decode, size_of
from pipeline.data.remote_file import RemoteFile
from pipeline.data.sources.tar_members import DamagedTar, Member, locate_members
from pipeline.data.stored_image import Cut, cut_out
from pipeline.evaluation.evaluator_npz import has_images, image_layout
from pipeline.sampling.save import SHEET, read_metadata

_SIDECARS = (".txt", ".json")


@dataclass(frozen=True)
class FileSlice:
    """A range of bytes in a file: all of it, or a member of a tar."""

    file: Path | RemoteFile
    name: str  # for messages
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes. Raises UserError when they cannot be read."""
        if isinstance(self.file, RemoteFile):
            return self.file.read_once(self.offset, self.file.size - self.offset if self.size is None else self.size)
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read() if self.size is None else file.read(self.size)
        except OSError as error:
            raise UserError(f"{self.name}: expected a file that can be read, found: {error.strerror}") from error


@dataclass(frozen=True)
class StoredImage:
    """An image on disk by its key, with its caption (.txt) and what else is known of it (.json), if they are there."""

    key: str  # its name in the folder or tar without extension, where it alone has it; else `name`
    slice: FileSlice
    caption_slice: FileSlice | None = None
    about_slice: FileSlice | None = None
    name: str = ""  # below the set's folder, unique in its set
    extension: str = ""  # in lower case
    text: str | None = None  # its caption, where that is known without reading a file
    raw_size: tuple[int, int] | None = None  # width and height, where the slice is bare RGB bytes
    cut: Cut | None = None  # what is kept of the slice's image

    def content(self) -> bytes:
        """The image file's bytes; of bare RGB bytes a PPM, of a part of an image a PNG of that."""
        if self.cut is not None:
            return png_bytes(self.image)
        if self.raw_size is None:
            return self.slice.read()
        return b"P6 %d %d 255\n" % self.raw_size + self.slice.read()

    @property
    def image(self) -> Image.Image:
        """RGB. Raises UserError if it cannot be read."""
        if self.raw_size is not None:
            return Image.frombytes("RGB", self.raw_size, self.slice.read())
        if self.cut is not None:
            try:
                return cut_out(self.slice.read(), self.cut)
            except ValueError as error:
                raise UserError(
                    f"{self.slice.name}: expected an image, found something unreadable ({error})"
                ) from error
        return decoded(self.content(), self.slice.name)

    def size(self, content: bytes) -> tuple[int, int]:
        """Width and height in pixels, upright, from `content`'s head. Raises UserError if it has none."""
        if self.raw_size is not None:
            return self.raw_size
        try:
            return size_of(content)
        except BadSample as bad:
            raise _unreadable(self.slice.name, bad) from bad

    @property
    def caption(self) -> str | None:
        """Its caption, or the content of the .txt beside it, if there is one. Raises UserError if it is no UTF-8."""
        if self.text is not None:
            return self.text
        if self.caption_slice is None:
            return None
        try:
            return decode_text(self.caption_slice.read()).strip()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.caption_slice.name}: expected a caption in UTF-8, found other bytes ({error.reason} at byte"
                f" {error.start}): save it as UTF-8"
            ) from error

    @property
    def about(self) -> dict[str, Any]:
        """The content of the .json beside it; empty if there is none. Raises UserError if it is no object."""
        if self.about_slice is None:
            return {}
        try:
            found = json.loads(self.about_slice.read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.about_slice.name}: expected JSON, found something else ({error})") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.about_slice.name}: expected a JSON object, found {type(found).__name__}")
        return found


@dataclass
class ImageSet:
    """The images at a path, and what else lies there."""

    images: list[StoredImage] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def told(self) -> str:
        """Counts: "9 images (6 files, 3 in 1 tar); left out: 1 (.avif is not read: 1, the first a.avif)"."""
        tars = Counter(image.slice.file for image in self.images if image.slice.size is not None and not image.raw_size)
        files = len(self.images) - tars.total()
        held = [f"{files:,} files"] if files else []
        held += [f"{tars.total():,} in {len(tars):,} tar{'s' * (len(tars) > 1)}"] if tars else []
        told = f"{len(self.images):,} images ({', '.join(held)})" if len(held) > 1 else f"{len(self.images):,} images"
        return f"{told}; {told_left_out(self.left_out)}" if self.left_out else told


def told_left_out(left_out: Sequence[tuple[str, str]]) -> str:
    """How many files were left out for which reason, and the first of each."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out:
        names.setdefault(reason, []).append(name)
    reasons = [f"{reason}: {len(found):,}, the first {visible(found[0])}" for reason, found in names.items()]
    return f"left out: {len(left_out):,} ({', '.join(reasons)})"


def read_set(path: Path) -> ImageSet:
    """Every image at `path`, sorted by file and, in tars, in the tar's order; none is decoded yet.

    Raises:
        UserError: nothing there, no image in it, or a tar that cannot be read to its end.
    """
    found = ImageSet()
    if has_images(path):
        found.images = _npz_images(path)
    elif path.is_dir():
        _add_folder(found, path)
    elif path.suffix.lower() in EXTENSIONS and path.is_file():
        _add_entries(found, [(path.name, FileSlice(path, str(path)))])
    elif path.is_file():
        _add_tar(found, path, "")
    if not found.images:
        what = "no image or tar" if path.exists() else "nothing"
        others = f"; {told_left_out(found.left_out)}" if found.left_out else ""
        raise UserError(f"{path}: expected a folder of images, a tar or a folder of tars, found {what}{others}")
    found.images = _with_unique_names(found.images)
    return found


def _npz_images(path: Path) -> list[StoredImage]:
    layout = image_layout(path)
    images = []
    for i in range(layout.n):
        piece = FileSlice(path, f"{path}: image {i}", layout.offset + i * layout.image_bytes, layout.image_bytes)
        images.append(StoredImage(f"{i:06d}", piece, name=f"{i:06d}", raw_size=(layout.width, layout.height)))
    return images


def images_at(path: Path) -> list[StoredImage]:
    """The images at `path`, as `read_set` finds them."""
    return read_set(path).images


def prepared_images(catalog: Catalog, rows: Sequence[int]) -> list[StoredImage]:
    """These samples of a split that `prepare` made. Raises UserError where their shards are damaged."""
    known = zip(catalog.keys(rows), catalog.captions(rows), catalog.image_slices(rows), strict=True)
    found = []
    for row, (key, text, (tar, begin, size)) in zip(rows, known, strict=True):
        name = f"{key}{catalog.extension}"
        piece = FileSlice(tar, f"{tar.url if isinstance(tar, RemoteFile) else tar}: {name}", begin, size)
        cut = catalog.cut(row)
        found.append(StoredImage(key, piece, name=name, extension=catalog.extension, text=text, cut=cut))
    return found


def named_images(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """(key, RGB image) of every image at `path`. Raises as `images_at` and `StoredImage.image` do."""
    for image in images_at(path):
        yield image.key, image.image


def decoded(content: bytes, where: str) -> Image.Image:
    """An RGB image from a file's bytes, as `prepare` decodes it. Raises UserError if it cannot be read."""
    try:
        return decode(content).image
    except BadSample as bad:
        raise _unreadable(where, bad) from bad


def _unreadable(where: str, bad: BadSample) -> UserError:
    why = f"{bad.reason}, {bad.detail}" if bad.detail else bad.reason
    return UserError(f"{where}: expected an image, found something unreadable ({why}); remove it")


def _add_folder(found: ImageSet, folder: Path) -> None:
    """Files of the folder and those below it, links followed, each folder once; then its tars."""
    files: list[tuple[str, FileSlice]] = []
    tars: list[tuple[str, Path]] = []
    for name, path in sorted(_files_below(found, folder)):
        if path.name == SHEET and "prompts" in (read_metadata(path) or {}):
            found.left_out.append((name, "the sheet of `smalti generate`"))
        elif path.suffix.lower() == ".tar":
            tars.append((name, path))
        else:
            files.append((name, FileSlice(path, str(path))))
    _add_entries(found, files)
    for name, path in tars:
        _add_tar(found, path, f"{name}/" if len(tars) > 1 or files else "")


def _files_below(found: ImageSet, folder: Path) -> Iterator[tuple[str, Path]]:
    """(name below `folder`, path) of every file; what is hidden, and folders that were seen before, are left out."""
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename}: expected a folder that can be read, found: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        below = Path(parent).relative_to(folder)
        seen.add(os.path.realpath(parent))
        for name in sorted(folders):
            inner = Path(parent, name)
            if _is_hidden(name):
                hidden = [file for file in inner.rglob("*") if file.suffix.lower() in EXTENSIONS]
                found.left_out += [(file.relative_to(folder).as_posix(), "hidden") for file in hidden]
            elif os.path.realpath(inner) in seen:
                found.left_out.append(((below / name).as_posix(), "a link to a folder that is read already"))
            else:
                continue
            folders.remove(name)
        folders.sort()
        for name in files:
            if _is_hidden(name):
                found.left_out.append(((below / name).as_posix(), "hidden"))
            else:
                yield (below / name).as_posix(), Path(parent, name)


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def _add_tar(found: ImageSet, path: Path, prefix: str) -> None:
    entries = []
    for member in _members(path):
        inner = member.name.removeprefix("./")
        name = f"{path}: {inner}"
        if any(map(_is_hidden, PurePosixPath(inner).parts)):
            found.left_out.append((name, "hidden"))
        elif not member.problem:
            entries.append((inner, FileSlice(path, name, member.offset, member.size)))
        elif PurePosixPath(inner).suffix.lower() in EXTENSIONS:
            found.left_out.append((name, "no regular file in a tar"))
    _add_entries(found, entries, prefix)


def _members(path: Path) -> Iterator[Member]:
    try:
        yield from locate_members(path)
    except DamagedTar as damage:
        raise UserError(
            f"{path}: expected an uncompressed tar of images, found something else or a damaged one ({damage});"
            " write it again"
        ) from damage


def _add_entries(found: ImageSet, entries: Iterable[tuple[str, FileSlice]], prefix: str = "") -> None:
    """Sort files by what their extensions say: images, their captions, and others, which are left out."""
    images: list[tuple[str, FileSlice]] = []
    sidecars: dict[str, FileSlice] = {}  # by name, the extension in lower case
    for name, piece in entries:
        stem, extension = _split(name)
        if extension in EXTENSIONS:
            images.append((name, piece))
        elif extension in _SIDECARS:
            sidecars[stem + extension] = piece
        else:
            found.left_out.append((prefix + name, f"{visible(extension) or 'no extension'} is not read"))
    for name, piece in images:
        stem, extension = _split(name)
        caption, about = (_sidecar(stem, kind, sidecars) for kind in _SIDECARS)
        found.images.append(StoredImage(stem, piece, caption, about, prefix + name, extension))


def _sidecar(stem: str, extension: str, sidecars: dict[str, FileSlice]) -> FileSlice | None:
    """That of the image's own name or, as WebDataset has it, of its name up to a dot: the longest there is."""
    folder, slash, base = stem.rpartition("/")
    while base:
        if found := sidecars.get(f"{folder}{slash}{base}{extension}"):
            return found
        base = base.rpartition(".")[0]
    return None


def _split(name: str) -> tuple[str, str]:
    """A name's stem, with its folders, and its extension in lower case."""
    stem, extension = os.path.splitext(name)
    return stem, extension.lower()


def _with_unique_names(images: list[StoredImage]) -> list[StoredImage]:
    """Images of one name (in tars) get a number; those of one stem (a.png, a.gif) have their names as keys."""
    stems = Counter(image.key for image in images)
    seen: Counter[str] = Counter()
    unique = []
    for image in images:
        seen[image.name] += 1
        name = image.name if seen[image.name] == 1 else f"{image.name}#{seen[image.name]}"
        unique.append(replace(image, name=name, key=image.key if stems[image.key] == 1 else name))
    return unique
