"""Promises of pipeline/data/catalog.py: captions, keys and images of any samples, by range, checked."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.prepare import PrepareConfig
from pipeline.core.errors import UserError
from pipeline.data.catalog import Catalog
from pipeline.data.catalog_columns import Columns, _write_lookup, columns_of, put_together
from pipeline.data.checked_file import BLOCK_BYTES, CheckedFile, CheckedWriter, MemoryFile
from pipeline.data.prepare import prepare
from pipeline.data.shards import Sample, read_samples
from tests.conftest import NO_TRACKING
from tests.data.sample_images import encoded, image, prepare_config, tree_bytes, write_folder, write_tar
from tests.launch import launch

IMAGES = 60


def _several(folder: Path) -> PrepareConfig:
    """Images with one to three captions each, in shards of 25."""
    source = {"kind": "table", "path": str(folder / "t.jsonl"), "path_column": "file", "key_column": "key"}
    return prepare_config(source, caption="random", shard_size=25, validation_fraction=0.2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Look, do not write."""
    folder = tmp_path_factory.mktemp("catalog")
    write_folder(folder / "images", IMAGES)
    rows = [
        {"key": f"k{n}", "file": f"images/{n:05d}.png", "caption": [f"Möwe {n}, {k}\u2009x" for k in range(1 + n % 3)]}
        for n in range(IMAGES)
    ]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(folder / "out", _several(folder), seed=0)
    return folder / "out"


@pytest.fixture
def own(prepared: Path, tmp_path: Path) -> Path:
    """The same, to be written to."""
    return Path(shutil.copytree(prepared, tmp_path / "own"))


def _known(samples: Iterator[Sample]) -> list[tuple[str, tuple[str, ...], bytes]]:
    return [(sample.key, sample.captions, sample.png) for sample in samples]


def test_the_catalog_says_of_any_samples_what_their_tar_holds(prepared: Path) -> None:
    for split in ("train", "val"):
        expected = _known(read_samples(prepared, split))
        catalog = Catalog(prepared, split)
        rows = random.Random(0).choices(range(len(catalog)), k=200)
        assert len(catalog) == len(expected) > 5
        assert _known(catalog.samples(rows)) == [expected[row] for row in rows]
        assert catalog.keys(rows) == [expected[row][0] for row in rows]
        assert catalog.caption_counts(rows).tolist() == [len(expected[row][1]) for row in rows]
        last = catalog.caption_counts(rows) - 1
        assert catalog.captions(rows, last) == [expected[row][1][-1] for row in rows]
        assert catalog.rows_of([key for key, _, _ in expected]) == {key: n for n, (key, _, _) in enumerate(expected)}
        assert all(catalog.has_caption(f"  {text.upper()}") for _, texts, _ in expected for text in texts)
        assert not catalog.has_caption("Möwe")
        assert catalog.rows_of(["nobody"]) == {}


def test_captions_are_read_without_a_tar_and_an_image_without_its_neighbours(own: Path) -> None:
    catalog = Catalog(own, "train")
    expected = _known(read_samples(own, "train"))
    (tar, begin, size) = catalog.image_slices([7])[0]
    content = tar.read_bytes()
    tar.write_bytes(bytes(begin) + content[begin : begin + size] + bytes(len(content) - begin - size))
    assert _known(catalog.samples([7])) == [expected[7]]
    with pytest.raises(UserError, match="damaged at sample 8"):
        next(catalog.samples([8]))
    for shard in own.glob("*/*.tar"):
        shard.unlink()
    alone = Catalog(own, "train")
    assert alone.keys(range(len(alone))) == [key for key, _, _ in expected]
    assert list(alone.caption_sample(1_000, seed=0)) == [text for _, texts, _ in expected for text in texts]


def test_a_bounded_sample_of_captions_is_fixed_by_the_seed_and_has_none_twice(prepared: Path) -> None:
    catalog = Catalog(prepared, "train")
    every = list(catalog.caption_sample(catalog.caption_count, seed=0))
    assert len(every) == catalog.caption_count == len(set(every))
    first, again, other = (list(catalog.caption_sample(20, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 20
    assert first == sorted(first, key=every.index)


def test_one_flipped_byte_in_any_column_is_found_and_named(own: Path) -> None:
    for path in sorted((own / "catalog").glob("train.*")):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{path.name} is .*damaged.*prepare again"):
            Catalog(own, "train").verify()
        path.write_bytes(content)
    (own / "catalog" / "train.captions").write_bytes(b"x")
    with pytest.raises(UserError, match="train.captions is damaged: expected .* bytes, found 1"):
        Catalog(own, "train")


def test_a_damaged_block_is_noticed_by_whoever_reads_it_and_by_no_other(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3 * BLOCK_BYTES + 100)
    writer = CheckedWriter(tmp_path / "file")
    for start in range(0, len(content), 5_000):
        writer.write(content[start : start + 5_000])
    checksums = writer.close()
    file = CheckedFile(tmp_path / "file", len(content), checksums)
    assert file.read(BLOCK_BYTES - 5, 2 * BLOCK_BYTES) == content[BLOCK_BYTES - 5 : 3 * BLOCK_BYTES - 5]
    flipped = bytearray(content)
    flipped[2 * BLOCK_BYTES + 17] ^= 1
    (tmp_path / "file").write_bytes(flipped)
    damaged = CheckedFile(tmp_path / "file", len(content), checksums)
    assert damaged.read(0, 2 * BLOCK_BYTES) == content[: 2 * BLOCK_BYTES]
    assert damaged.read(3 * BLOCK_BYTES, 100) == content[3 * BLOCK_BYTES :]
    with pytest.raises(UserError, match=f"between bytes {2 * BLOCK_BYTES} and"):
        damaged.read(2 * BLOCK_BYTES, 1)


def test_what_was_prepared_without_a_catalog_still_loads(own: Path) -> None:
    with_one, rows = Catalog(own, "train"), range(len(Catalog(own, "train")))
    index = json.loads((own / "index.json").read_text())
    del index["catalog"]
    (own / "index.json").write_text(json.dumps(index))
    shutil.rmtree(own / "catalog")
    without = Catalog(own, "train")
    assert _known(without.samples(rows)) == _known(with_one.samples(rows))
    keys = with_one.keys(rows)
    assert without.rows_of(keys) == with_one.rows_of(keys)
    assert list(without.caption_sample(20, 3)) == list(with_one.caption_sample(20, 3))
    without.verify()


def test_parts_of_an_earlier_version_get_a_catalog_and_are_not_made_again(prepared: Path, own: Path) -> None:
    expected = tree_bytes(own)
    for path in (own / "parts").glob("*.columns.npz"):
        path.unlink()
        record_path = path.with_name(path.name.replace(".columns.npz", ".json"))
        record = json.loads(record_path.read_text())
        del record["columns"]
        record_path.write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(own / "catalog")
    tars = {path: path.stat().st_mtime_ns for path in own.glob("*/*.tar")}
    prepare(own, _several(prepared.parent), seed=0)
    assert {path: path.stat().st_mtime_ns for path in tars} == tars
    found = tree_bytes(own)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name] and not name.endswith(".json")] == []


def test_numbers_of_the_metadata_become_columns(tmp_path: Path) -> None:
    about: list[dict[str, object]] = [{"score": 0.25, "width": 20, "url": "u"}, {"width": 30, "nsfw": True}, {}]
    members = []
    for number, meta in enumerate(about):
        members.append((f"{number}.json", json.dumps(meta).encode()))
        members.append((f"{number}.png", encoded(image(number))))
        members.append((f"{number}.txt", b"a caption"))
    write_tar(tmp_path / "in/0.tar", members[:6])
    write_tar(tmp_path / "in/1.tar", members[6:])
    config = prepare_config({"kind": "webdataset", "urls": f"{tmp_path}/in/*.tar"}, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    catalog = Catalog(tmp_path / "out", "train")
    assert catalog.numbers() == ["score", "width"]
    assert np.array_equal(catalog.number("score", range(3)), [0.25, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(catalog.number("width", [2, 1, 0]), [np.nan, 30, 20], equal_nan=True)


def test_lookups_that_are_sorted_in_slices_are_those_that_are_sorted_at_once() -> None:
    hashes = np.random.default_rng(0).integers(0, 1 << 64, 5_000, np.uint64)
    hashes[100:200] = hashes[:100]  # the same captions again
    parts: list[Columns] = [{"hashes": hashes[:1_234]}, {"hashes": hashes[1_234:]}]
    found = []
    for size in (1 << 20, 300):
        sink = MemoryFile()
        _write_lookup(lambda: iter(parts), "hashes", len(hashes), sink, size)
        found.append(np.frombuffer(sink.read(0, sink.size), "<u8").reshape(-1, 2))
    assert np.array_equal(found[0], found[1])
    assert len(found[0]) == 4_900
    assert np.array_equal(hashes[found[0][:, 1].astype(int)], found[0][:, 0])
    assert not np.isin(np.arange(100, 200), found[0][:, 1]).any()


def test_of_a_hundred_kinds_of_numbers_the_most_common_are_kept() -> None:
    samples = [Sample(f"{n}", b"", "c", {f"of{n}": 1, "all": n}) for n in range(100)]
    files: dict[str, MemoryFile] = {}
    parts = [columns_of([sample]) for sample in samples]
    put_together(lambda: iter(parts), lambda name: files.setdefault(name, MemoryFile()))
    kept = [name for name in files if name.startswith("number.")]
    assert len(kept) == 32
    assert np.frombuffer(files["number.all"].read(0, 800), "<f8").tolist() == list(range(100))


@pytest.mark.slow
def test_the_text_tokenizer_learns_from_no_more_than_max_captions(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    launch("stages.text_tokenizer", "--config", str(run / "config.yaml"), "text_tokenizer.max_captions=20", NO_TRACKING)
    assert json.loads((run / "text-tokenizer/stats.json").read_text())["captions"] == 20
