"""Promises of the index of image shards: the same shards come back, few bytes, damage told, earlier versions read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.data.catalog import Catalog
from pipeline.data.prepare import prepare
from pipeline.data.shard_table import ShardEntry, read_table, write_table
from pipeline.data.shards import caption_count, read_index, read_shards
from pipeline.data.stream import ImageStream
from tests.data.sample_images import folder_config, write_folder


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    config = folder_config(write_folder(tmp_path / "in", 20), shard_size=8, validation_fraction=0.1)
    prepare(tmp_path / "out", config, seed=0)
    return tmp_path / "out"


def _entry(number: int) -> ShardEntry:
    return {"name": f"train/{number:06d}.tar", "samples": 1_000, "bytes": 10**8 + number, "sha256": f"{number:064x}"}


def test_ten_thousand_shards_take_less_than_a_megabyte_wherever_their_images_lie(tmp_path: Path) -> None:
    own = [_entry(number) for number in range(10_000)]
    placed: list[ShardEntry] = [
        {**entry, "captions": 1_007, "tar": f"/data/laion/\udcff/{number:05d}.tar", "tar_bytes": 10**9}
        for number, entry in enumerate(own)
    ]
    for shards in (own, placed):
        table = read_table(tmp_path / "t", "train", write_table(tmp_path / "t", shards))
        assert (tmp_path / "t").stat().st_size < 1_000_000
        assert [table[number] for number in (0, 7_000, -1)] == [shards[number] for number in (0, 7_000, -1)]
        assert list(table[10:12]) == shards[10:12]
        assert (len(table), table.samples.sum()) == (10_000, 10**7)


def test_a_flipped_byte_in_the_table_is_told(prepared: Path) -> None:
    table = prepared / "train.shards"
    content = bytearray(table.read_bytes())
    content[5] ^= 1
    table.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.shards is missing or damaged: expected sha256 .* prepare again"):
        read_index(prepared)
    table.unlink()
    with pytest.raises(UserError, match=r"train\.shards is missing or damaged"):
        read_shards(prepared, "train")


def test_an_index_of_an_earlier_version_which_lists_every_shard_is_still_read(prepared: Path) -> None:
    index = read_index(prepared)
    keys, images = Catalog(prepared, "train").keys([0, 3]), next(ImageStream(prepared, "train", 0).batches(0, 8))
    listed = {
        split: {"samples": entry["samples"], "bytes": entry["bytes"], "shards": list(entry["shards"])}
        for split, entry in index["splits"].items()
    }
    for split in listed:
        (prepared / f"{split}.shards").unlink()
    (prepared / "index.json").write_text(json.dumps({**index, "splits": listed}))
    assert Catalog(prepared, "train").keys([0, 3]) == keys
    assert (next(ImageStream(prepared, "train", 0).batches(0, 8))["images"] == images["images"]).all()
    assert caption_count(read_index(prepared)["splits"]["train"]) == caption_count(index["splits"]["train"])
