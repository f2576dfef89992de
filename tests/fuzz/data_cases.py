"""Malformed sources of images: each kind is written whole, damaged at one place, and prepared.

`Finding` is raised for what must not be: a sample that is gone without a count. So is any exception but UserError.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from tests.data.sample_images import encoded, image, prepare_config, write_tar
from tests.fuzz.mutations import mutated

COUNT = 6
_IMAGES = [encoded(image(number)) for number in range(COUNT)]
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ENCODED = {kind: [encoded(image(number), kind) for number in range(COUNT)] for kind in _FORMATS}


class Finding(Exception):
    """What must not be, in a sentence."""


def _prepared(folder: Path, source: dict[str, object], held: int = COUNT, **values: object) -> None:
    """Prepare it: a refusal is right, and so is a result that counts the `held` samples of the source."""
    try:
        config = prepare_config(source, max_rejected_fraction=1.0, validation_fraction=0.0, **values)
        index = prepare(folder / "out", config, seed=0)
    except UserError as error:
        if "please report" in str(error) or "\n" in str(error):
            raise Finding(f"an error that is none: {error}") from error
        return
    kept = sum(split["samples"] for split in index["splits"].values())
    counted = index["rejected"]["samples"] + sum(index.get("left_out", {}).values())
    if kept < held and not counted:
        raise Finding(f"{held - kept} of {held} samples are gone without a count")


def tar(folder: Path, rng: Random) -> None:
    """A tar of webdataset, damaged anywhere."""
    members = [
        (f"{n:03d}.{end}", c) for n in range(COUNT) for end, c in (("png", _IMAGES[n]), ("txt", b"a cat %d" % n))
    ]
    path = write_tar(folder / "in.tar", members)
    path.write_bytes(mutated(path.read_bytes(), rng))
    _prepared(folder, {"kind": "webdataset", "urls": str(path)}, filters={})


def tar_json(folder: Path, rng: Random) -> None:
    """A tar whose metadata are damaged."""
    members = []
    for n in range(COUNT):
        about = json.dumps({"caption": f"a cat {n}", "group": n, "more": [{"deep": [n]}]}).encode()
        if n == 2:
            about = b"[" * 50_000 if rng.random() < 0.05 else mutated(about, rng)
        members += [(f"{n:03d}.png", _IMAGES[n]), (f"{n:03d}.json", about)]
    write_tar(folder / "in.tar", members)
    source: dict[str, object] = {
        "kind": "webdataset",
        "urls": str(folder / "in.tar"),
        "group_field": rng.choice((None, "group", "more")),
    }
    _prepared(folder, source)


def csv_table(folder: Path, rng: Random) -> None:
    """A CSV table, damaged anywhere."""
    text = io.StringIO()
    csv.writer(text).writerows([("file", "caption"), *((f"{n}.png", f'a "red", cat\n{n}') for n in range(COUNT))])
    _table(folder, rng, "in.csv", text.getvalue().encode())


def jsonl_table(folder: Path, rng: Random) -> None:
    """A JSONL table, damaged anywhere."""
    rows = [json.dumps({"file": f"{n}.png", "caption": f"a cat {n}"}) for n in range(COUNT)]
    _table(folder, rng, "in.jsonl", "\n".join(rows).encode())


def _table(folder: Path, rng: Random, name: str, content: bytes) -> None:
    for n in range(COUNT):
        (folder / f"{n}.png").write_bytes(_IMAGES[n])
    content = mutated(content, rng)
    (folder / name).write_bytes(content)
    # A text that is cut at the end of a row is whole: nobody can tell.
    held = min(sum(f"{n}.png".encode() in content for n in range(COUNT)), sum(map(bool, content.split(b"\n"))))
    _prepared(folder, {"kind": "table", "path": str(folder / name), "path_column": "file"}, held)


def parquet_table(folder: Path, rng: Random) -> None:
    """A Parquet table, damaged anywhere."""
    rows = {
        "image": [{"bytes": content, "path": None} for content in _IMAGES],
        "caption": [f"cat {n}" for n in range(COUNT)],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "in.parquet")
    path = folder / "in.parquet"
    path.write_bytes(mutated(path.read_bytes(), rng))
    _prepared(folder, {"kind": "table", "path": str(path), "image_column": "image"})


def images(folder: Path, rng: Random) -> None:
    """A folder with one damaged image of any format."""
    kind = rng.choice(_FORMATS)
    for n, content in enumerate(_ENCODED[kind]):
        (folder / f"{n}.{kind.lower()}").write_bytes(mutated(content, rng) if n == 2 else content)
        (folder / f"{n}.txt").write_text(f"a cat {n}")
    _prepared(folder, {"kind": "folder", "path": str(folder)})


def captions(folder: Path, rng: Random) -> None:
    """A folder with one damaged caption and one odd name."""
    for n in range(COUNT):
        stem = f"{n}" if n != 3 else rng.choice(("a.b", " ", "x" * 200, "é\u200b", "-rf", "a\nb", "__x", "CON", "%2F"))
        (folder / f"{stem}.png").write_bytes(_IMAGES[n])
        caption = f"a cat {n}, on a mat".encode()
        (folder / f"{stem}.txt").write_bytes(mutated(caption, rng) if n == 2 else caption)
    _prepared(folder, {"kind": "folder", "path": str(folder)})


CASES: dict[str, Callable[[Path, Random], None]] = {
    "tar": tar,
    "json": tar_json,
    "csv": csv_table,
    "jsonl": jsonl_table,
    "parquet": parquet_table,
    "image": images,
    "caption": captions,
}
