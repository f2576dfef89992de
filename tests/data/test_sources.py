"""Sources: `datasets`, groups, near-duplicates, and sources that go away or change."""

from __future__ import annotations

import json
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.base import digest, identity
from pipeline.core.errors import UserError
from pipeline.data.prepare import _tasks, prepare
from pipeline.data.shards import read_samples
from pipeline.data.sources import open_source
from pipeline.data.sources.base import Part, Record
from tests.data.sample_images import encoded, folder_config, image, prepare_config, tree_bytes, write_folder, write_tar


def samples_in(directory: Path, *splits: str) -> list[tuple[str, str]]:
    return [(s.key, s.caption) for split in splits or ("train",) for s in read_samples(directory, split)]


def save_dataset(path: str, count: int, **columns: list[Any]) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'smalti[data]'")
    values = {
        "image": [{"bytes": encoded(image(n)), "path": None} for n in range(count)],
        "caption": [f"number {n}" for n in range(count)],
        **columns,
    }
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    features |= {name: datasets.Value("string") for name in columns}
    rows = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    datasets.DatasetDict({"train": rows}).save_to_disk(path)


def test_a_saved_hugging_face_data_set_becomes_samples_and_is_not_made_twice(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    save_dataset(str(tmp_path / "in"), 5, name=names)
    source = {"kind": "huggingface", "path": str(tmp_path / "in"), "split": "train", "key_column": "name"}
    config = prepare_config(source, shard_size=2, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    assert samples_in(tmp_path / "out") == [(name, f"number {n}") for n, name in enumerate(names)]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.tar")}
    prepare(tmp_path / "out", config, seed=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*.tar")} == before


def test_a_missing_split_or_column_of_a_data_set_is_named(tmp_path: Path) -> None:
    save_dataset(str(tmp_path / "in"), 2)
    source = {"kind": "huggingface", "path": str(tmp_path / "in")}
    with pytest.raises(UserError, match="split: expected one of train, found None"):
        prepare(tmp_path / "out", prepare_config(source), seed=0)
    with pytest.raises(UserError, match="expected a column 'text', found image, caption"):
        prepare(tmp_path / "out", prepare_config({**source, "split": "train", "caption_column": "text"}), seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "huggingface", "webdataset"])
def test_a_group_is_never_divided_between_the_splits(tmp_path: Path, kind: str) -> None:
    groups = [f"group {n % 6}" for n in range(36)]
    source: dict[str, Any]
    if kind == "huggingface":
        save_dataset(str(tmp_path / "in"), 36, caption=[f"{n}" for n in range(36)], artist=groups)
        source = {"kind": kind, "path": str(tmp_path / "in"), "split": "train", "group_column": "artist"}
    elif kind == "webdataset":
        members = [
            member
            for n in range(36)
            for member in (
                (f"{n:03d}.png", encoded(image(n))),
                (f"{n:03d}.txt", f"{n}".encode()),
                (f"{n:03d}.json", json.dumps({"artist": groups[n]}).encode()),
            )
        ]
        source = {"kind": kind, "urls": str(write_tar(tmp_path / "0.tar", members)), "group_field": "artist"}
    else:
        write_folder(tmp_path / "images", 36)
        rows = [{"file": f"images/{n:05d}.png", "caption": f"{n}", "artist": groups[n]} for n in range(36)]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"kind": "table", "path": str(tmp_path / "t.jsonl"), "path_column": "file", "group_column": "artist"}
    prepare(tmp_path / "out", prepare_config(source, validation_fraction=0.5), seed=0)
    found = [{groups[int(text)] for _, text in samples_in(tmp_path / "out", split)} for split in ("train", "val")]
    assert found[0]
    assert found[1]
    assert found[0].isdisjoint(found[1])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_sample_with_a_blank_group_is_a_group_of_its_own(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "images", 36)
    rows = [{"key": f"k{n}", "file": f"images/{n:05d}.png", "caption": f"{n}", "artist": ""} for n in range(36)]
    lines = [json.dumps(row) if kind == "jsonl" else ",".join(row.values()) for row in rows]
    (tmp_path / f"t.{kind}").write_text("\n".join(lines if kind == "jsonl" else [",".join(rows[0]), *lines]))
    columns = {"path_column": "file", "key_column": "key", "group_column": "artist"}
    source = {"kind": "table", "path": str(tmp_path / f"t.{kind}"), **columns}
    config = prepare_config(source, validation_fraction=0.5)
    index = prepare(tmp_path / "out", config, seed=0)
    assert index["splits"]["train"]["samples"] + index["splits"]["val"]["samples"] == 36
    assert index["splits"]["val"]["samples"] > 9
    before = tree_bytes(tmp_path / "out")
    # A part whose blank groups are one, as they were, is made again, and not mixed with those of today.
    (task,) = _tasks(tmp_path / "out", config, 0)
    earlier = digest([3, task.part.fingerprint, identity(config) | {"max_rejected_fraction": 0.1}, 0])
    task.record_path.write_text(json.dumps({**task.record(), "fingerprint": earlier, "shards": {}}))
    prepare(tmp_path / "out", config, seed=0)
    assert tree_bytes(tmp_path / "out") == before


def _smooth_folder(folder: Path) -> Path:
    """Twelve smooth images; 03 and 09 again as JPEG under other names."""
    folder.mkdir()
    for number in range(12):
        scene = image(number, (8, 8)).resize((64, 64))
        (folder / f"{number:02d}.png").write_bytes(encoded(scene))
        (folder / f"{number:02d}.txt").write_text("a scene")
        if number in (3, 9):
            (folder / f"copy{number}.jpg").write_bytes(encoded(scene, "JPEG", quality=92))
            (folder / f"copy{number}.txt").write_text("the same scene")
    return folder


def test_near_duplicates_are_counted_and_the_first_is_kept(tmp_path: Path) -> None:
    folder = _smooth_folder(tmp_path / "in")
    values = {"image_size": 32, "validation_fraction": 0, "shard_size": 5, "max_rejected_fraction": 0.5}
    config = folder_config(folder, **values, filters={"near_duplicate_bits": 3})
    index = prepare(tmp_path / "out", config, seed=0)
    assert index["rejected"]["reasons"] == {"near-duplicate": 2}
    assert [key for key, _ in samples_in(tmp_path / "out")] == [f"{n:02d}" for n in range(12)]
    before = tree_bytes(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/0*")}
    prepare(tmp_path / "out", config, seed=0)  # finds everything done, what was left out included
    assert tree_bytes(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/0*")} == times
    index = prepare(tmp_path / "all", folder_config(folder, **values), seed=0)
    assert index["rejected"]["samples"] == 0


def test_a_sample_comes_back_when_what_it_repeated_is_gone(tmp_path: Path) -> None:
    folder = _smooth_folder(tmp_path / "in")
    values = {"image_size": 32, "validation_fraction": 0, "shard_size": 6, "filters": {"near_duplicate_bits": 3}}
    config = folder_config(folder, **values, max_rejected_fraction=0.5)
    prepare(tmp_path / "out", config, seed=0)
    for number in (3, 9):
        (folder / f"{number:02d}.png").write_bytes(encoded(image(70 + number, (8, 8)).resize((64, 64))))
    index = prepare(tmp_path / "out", config, seed=0)
    assert index["rejected"]["samples"] == 0
    assert {"copy3", "copy9"} <= {key for key, _ in samples_in(tmp_path / "out")}


def test_a_replaced_image_is_noticed_by_the_next_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 6)
    config = folder_config(folder, shard_size=2, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    (folder / "00003.png").write_bytes(encoded(image(99, (40, 40))))
    prepare(tmp_path / "out", config, seed=0)
    prepare(tmp_path / "fresh", config, seed=0)
    assert tree_bytes(tmp_path / "out" / "train") == tree_bytes(tmp_path / "fresh" / "train")


# --- a source that disappears or changes halfway --------------------------------------------------------------------


def first_part(config: Any) -> tuple[Any, Part]:
    source = open_source(config.source, config.image_size)
    return source, next(iter(source.parts(config.shard_size)))


def test_a_folder_that_disappears_halfway_stops_and_rejects_nothing(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 6)
    source, part = first_part(folder_config(folder))
    records = source.records(part)
    next(records)
    folder.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"the source failed at .*00001\.png: it was listed a moment ago"):
        next(records)


def test_a_caption_that_disappears_is_not_a_missing_caption(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 2)
    source, part = first_part(folder_config(folder))
    (folder / "00000.txt").unlink()
    with pytest.raises(UserError, match=r"00000\.txt: it was listed a moment ago and is gone"):
        list(source.records(part))


def test_an_image_that_cannot_be_read_is_rejected_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 3)
    (folder / "00001.png").unlink()
    (folder / "00001.png").symlink_to(tmp_path / "nowhere")
    index = prepare(tmp_path / "out", folder_config(folder, max_rejected_fraction=0.5), seed=0)
    assert index["rejected"]["reasons"] == {"unreadable file": 1}


def tar_config(tmp_path: Path, count: int) -> Any:
    members = [
        member for n in range(count) for member in ((f"{n:03d}.png", encoded(image(n))), (f"{n:03d}.txt", b"caption"))
    ]
    write_tar(tmp_path / "in/0.tar", members)
    return prepare_config({"kind": "webdataset", "urls": str(tmp_path / "in/*.tar")}, validation_fraction=0)


def test_a_tar_that_disappears_or_is_replaced_while_it_is_read_stops_and_rejects_nothing(tmp_path: Path) -> None:
    config = tar_config(tmp_path, 4)
    source, part = first_part(config)
    records = source.records(part)
    next(records)
    tar_config(tmp_path, 9)
    with pytest.raises(UserError, match=r"0\.tar changed while it was being read"):
        list(records)
    source, part = first_part(config)
    (tmp_path / "in/0.tar").unlink()
    with pytest.raises(UserError, match=r"the source failed at .*0\.tar"):
        list(source.records(part))


@pytest.mark.parametrize("urls", ["*.tar", "0.tar"])
def test_tars_that_are_links_are_read_and_one_whose_target_is_replaced_is_told(tmp_path: Path, urls: str) -> None:
    tar_config(tmp_path, 4)
    os.utime(tmp_path / "in/0.tar", (1e9, 1e9))
    (tmp_path / "links").mkdir()
    (tmp_path / "links/0.tar").symlink_to(tmp_path / "in/0.tar")
    config = prepare_config({"kind": "webdataset", "urls": str(tmp_path / "links" / urls)}, validation_fraction=0)
    assert prepare(tmp_path / "out", config, seed=0)["source_samples"] == 4
    source, part = first_part(config)
    tar_config(tmp_path, 9)
    with pytest.raises(UserError, match=r"0\.tar changed while it was being read"):
        list(source.records(part))


@pytest.mark.parametrize("listed", [True, False])
def test_tars_are_read_from_a_web_server_whether_it_lists_them_or_not(tmp_path: Path, listed: bool) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install aiohttp")
    tar_config(tmp_path, 4)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def list_directory(self, path: Any) -> Any:
            return super().list_directory(path) if listed else self.send_error(403)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "in"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/0.tar"
        config = prepare_config({"kind": "webdataset", "urls": url}, validation_fraction=0)
        assert prepare(tmp_path / "out", config, seed=0)["source_samples"] == 4
        source, part = first_part(config)
        os.utime(tmp_path / "in/0.tar", (1e9, 1e9))  # such a server says when, and no ETag
        with pytest.raises(UserError, match=r"0\.tar changed while it was being read"):
            list(source.records(part))
        missing = prepare_config({"kind": "webdataset", "urls": url.replace("0.tar", "1.tar")})
        with pytest.raises(UserError, match=r"expected tars at .*1\.tar, found none"):
            prepare(tmp_path / "out", missing, seed=0)
        server.shutdown()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_that_changes_or_disappears_halfway_stops(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "images", 8)
    path = tmp_path / f"t.{kind}"

    def write(word: str) -> None:
        rows = [{"file": f"images/{n:05d}.png", "caption": f"{word} {n}"} for n in range(8)]
        if kind == "parquet":
            import pyarrow
            import pyarrow.parquet as pq

            pq.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("file,caption\n" + "".join(f"{row['file']},{row['caption']}\n" for row in rows))

    write("number")
    config = prepare_config({"kind": "table", "path": str(path), "path_column": "file"}, shard_size=4)
    source = open_source(config.source, 8)
    parts = list(source.parts(4))
    assert [sum(isinstance(item, Record) for item in source.records(part)) for part in parts] == [4, 4]
    write("another")
    with pytest.raises(UserError, match=rf"t\.{kind} .*changed while it was being read"):
        list(source.records(parts[1]))
    path.unlink()
    with pytest.raises(UserError, match=rf"the source failed at .*t\.{kind}"):
        list(source.records(parts[1]))


def test_a_column_of_images_that_holds_no_bytes_is_rejected_by_name(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    rows = [{"image": encoded(image(n)).hex(), "caption": f"number {n}"} for n in range(3)]
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = {"kind": "table", "path": str(tmp_path / "t.parquet"), "bytes_column": "image"}
    with pytest.raises(UserError, match=r"3 of 3 samples rejected \(3 not an image\)"):
        prepare(tmp_path / "out", prepare_config(source), seed=0)
    assert "expected bytes, found str" in (tmp_path / "out/rejected.jsonl").read_text()


def test_thousands_of_tars_are_listed_without_opening_one(tmp_path: Path) -> None:
    for number in range(3_000):
        (tmp_path / f"{number:05d}.tar").touch()
    opened: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]).endswith(".tar"):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    try:
        for urls in ("*.tar", "{00000..02999}.tar"):
            config = prepare_config({"kind": "webdataset", "urls": f"{tmp_path}/{urls}"})
            assert len(list(open_source(config.source, 8).parts(1_000))) == 3_000
        assert not opened
        (tmp_path / "00000.tar").read_bytes()
        assert opened, "the watch sees nothing"
    finally:
        watching = False


# --- paths and URLs that nothing opens -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "table", "webdataset", "huggingface"])
@pytest.mark.parametrize(
    "url",
    [
        "nothing://x",
        "gs://b/c",
        "{a",
        "{1..3",
        "\0",
        "a" * 5_000,
        "/dev/null",
        "~",
        "http://127.0.0.1:9/x",
        "zip://a::/b",
    ],
)
def test_a_place_that_is_no_source_is_told_in_one_line(
    tmp_path: Path, kind: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody's real one is read through
    source = {"kind": kind, "urls" if kind == "webdataset" else "path": url}
    source |= {"path": url + ".csv", "path_column": "x"} if kind == "table" else {}
    with pytest.raises(UserError) as told:
        prepare(tmp_path / "out", prepare_config(source), seed=0)
    assert "\n" not in str(told.value)


def test_passwords_of_a_source_are_in_no_config_message_key_or_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALTI_CREDENTIALS", "")
    config = prepare_config({"kind": "folder", "path": "nothing://me:hunter2@host/x"})
    assert "hunter2" not in config.model_dump_json()
    with pytest.raises(UserError) as told:
        prepare(tmp_path / "out", config, seed=0)
    assert "hunter2" not in str(told.value)
    urls = [f"nothing://me:hunter2@host/{n}.png?sig=hunter3" for n in range(3)]
    write_folder(tmp_path / "images", 2)
    lines = [f"{url},number {n}" for n, url in enumerate([*urls, "images/00000.png"])]
    (tmp_path / "t.csv").write_text("\n".join(["file,caption", *lines]))
    source = {"kind": "table", "path": str(tmp_path / "t.csv"), "path_column": "file"}
    values = {"max_rejected_fraction": 1, "validation_fraction": 0}
    prepare(tmp_path / "out", prepare_config(source, **values), seed=0)
    for name, content in tree_bytes(tmp_path / "out").items():
        assert b"hunter" not in content, name
