"""Sources as chance damages them, each by its seed: tars, CSV, JSONL and Parquet tables, folders.

    python -m tests.data.malformed 5000            # seeds 0 to 4,999; one line for each that breaks a promise
    python -m tests.data.malformed 100 7000        # seeds 7,000 to 7,099

The promises: `prepare` ends with an index or with a `UserError` of one line, and whatever the source holds is kept,
rejected or left out.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from pipeline.data.shards import caption_count
from tests.data.sample_images import encoded, image, prepare_config, write_tar

_IMAGES = [encoded(image(number)) for number in range(8)]
_NAMES = ["a.b", "a", "a.b.c", "x/y.z", ".h", "__meta__", "d/e", "é", "a-b", "0" * 120, "../up", "./p"]
_EXTENSIONS = ["png", "txt", "json", "jpg", "cls", "seg.png", "PNG", "gif"]
_TEXTS = [b'{"caption":"x"}', b"a cat", b"[]", b"{}", b'{"caption":["a",1,null]}', b"", b"[" * 50_000]
_CAPTIONS = ["a cat", 'a "red" cat', "a, b", "x\ny", None]
_SNIPPETS = [
    b'"',
    b",",
    b"\n",
    b"\r\n",
    b"[",
    b"{",
    b"}",
    b"\0",
    b"\x1b[2J",
    b"\xef\xbb\xbf",
    b"1e999",
    b"null",
    b"\xff\xfe",
]
_SNIPPETS += [b"  \n", b"\x0b\n", b"\xc2\xa0\n", b"\x1c\n", b"\x85\n", b"\\u0000", b"\\ud800"]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes with some changed, cut out, put in, or repeated."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(6):
            case 0 if found:
                found[at % len(found)] = rng.randrange(256)
            case 1:
                del found[at : at + rng.choice([1, 10, 512, 2_000])]
            case 2:
                found[at:at] = rng.randbytes(rng.choice([1, 3, 512]))
            case 3:
                found[at:at] = rng.choice(_SNIPPETS)
            case 4 if found:
                begin = rng.randrange(len(found))
                found[at:at] = found[begin : begin + rng.choice([5, 100, 512, 1_536])]
            case 5 if rng.random() < 0.3:
                del found[at:]
    return bytes(found)


def source(folder: Path, rng: random.Random) -> dict[str, Any]:
    """A source in `folder`, as the config names it."""
    kind = rng.choice(["tars", "tars", "tars", "csv", "csv", "jsonl", "parquet", "folder"])
    if kind == "tars":
        return _tars(folder, rng)
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.png").write_bytes(_IMAGES[number])
    return _folder(folder, rng) if kind == "folder" else _table(folder, kind, rng)


def _tars(folder: Path, rng: random.Random) -> dict[str, Any]:
    for number in range(rng.randrange(1, 4)):
        members = []
        for sample in range(rng.randrange(8)):
            name = rng.choice(_NAMES) + rng.choice(["", str(sample), f".{sample}"])
            for extension in rng.sample(_EXTENSIONS, rng.randrange(1, 4)):
                is_image = extension.lower().endswith(("png", "jpg", "gif"))
                members.append((f"{name}.{extension}", rng.choice(_IMAGES if is_image else _TEXTS)))
        if rng.random() < 0.3:
            rng.shuffle(members)
        path = write_tar(folder / f"{number}.tar", members)
        content = path.read_bytes() * rng.choice([1, 1, 1, 2])
        content = gzip.compress(content) if rng.random() < 0.3 else content
        path.write_bytes(damaged(content, rng) if rng.random() < 0.7 else content)
    found = {"kind": "webdataset", "urls": str(folder / "*.tar"), "group": rng.choice(["adjacent", "buffered"])}
    return found | ({"key_pattern": "(.*?)[.]"} if rng.random() < 0.2 else {})


def _folder(folder: Path, rng: random.Random) -> dict[str, Any]:
    for number in range(6):
        name = rng.choice(["a.b", "a", ".h", "é"]) + str(number)
        (folder / f"{name}.png").write_bytes(damaged(_IMAGES[number], rng))
        (folder / f"{name}.txt").write_bytes(damaged(b"a caption", rng))
    return {"kind": "folder", "path": str(folder)}


def _table(folder: Path, kind: str, rng: random.Random) -> dict[str, Any]:
    captions = [*_CAPTIONS, ["a", "b"], 7, {"a": 1}] if kind == "jsonl" else _CAPTIONS
    rows: list[dict[str, Any]] = [
        {"file": f"{number % 6}.png", "caption": rng.choice(captions), "id": str(number)}
        for number in range(rng.randrange(1, 30))
    ]
    path = folder / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "caption", "id"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet as pq

        rows = [{**row, "image": {"bytes": rng.choice([*_IMAGES, None, b""]), "path": row["file"]}} for row in rows]
        pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    if rng.random() < 0.8:
        path.write_bytes(damaged(path.read_bytes(), rng))
    found = {"kind": "table", "path": str(path)} | ({} if kind == "parquet" else {"path_column": "file"})
    return found | ({"key_column": "id"} if rng.random() < 0.3 else {})


def broken_promise(seed: int, folder: Path) -> str:
    """What `prepare` does wrong with the source of this seed; empty if nothing."""
    rng = random.Random(seed)
    try:
        config = prepare_config(
            source(folder / "in", rng),
            validation_fraction=rng.choice([0, 0.3]),
            max_rejected_fraction=1,
            shard_size=rng.choice([3, 5, 1_000]),
            caption=rng.choice(["first", "all", "random"]),
        )
        index = prepare(folder / "out", config, seed=0)
    except UserError as error:
        ours = "please report" in str(error) or "failed at" in str(error) or "changed while" in str(error)
        return str(error) if ours or "\n" in str(error) else ""
    except Exception:
        return traceback.format_exc()
    kept = sum(caption_count(split) for split in index["splits"].values())
    accounted = kept + index["rejected"]["samples"] + sum(index["left_out"].values())
    return "" if accounted == index["source_samples"] else f"{accounted} of {index['source_samples']} accounted for"


def main(count: int, first: int = 0) -> int:
    """Try so many seeds, from `first` on; returns how many break a promise."""
    broken: Counter[str] = Counter()
    for seed in range(first, first + count):
        folder = Path(tempfile.mkdtemp())
        if what := broken_promise(seed, folder):
            broken[what.splitlines()[-1]] += 1
            print(f"seed {seed}: {what}", flush=True)
        shutil.rmtree(folder)
    print(f"{count} malformed sources, {broken.total()} broken promises")
    return broken.total()


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
