from __future__ import annotations

import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_samples
from pipeline.data.stream import ImageStream
from tests.data.sample_images import folder_config, write_folder

SAMPLES = 90


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three uneven shards, 90 training samples."""
    directory = tmp_path_factory.mktemp("stream")
    config = folder_config(write_folder(directory / "in", SAMPLES), shard_size=40, validation_fraction=0)
    prepare(directory / "out", config, seed=0)
    return directory / "out"


def _keys(prepared: Path) -> dict[bytes, str]:
    """Decoded image -> key."""
    return {
        np.asarray(sample.image).transpose(2, 0, 1).tobytes(): sample.key for sample in read_samples(prepared, "train")
    }


def _take(stream: ImageStream, consumed: int, batch_size: int, batches: int) -> list[bytes]:
    found = []
    for batch in islice(stream.batches(consumed, batch_size), batches):
        assert batch["images"].dtype == torch.uint8
        found += [image.numpy().tobytes() for image in batch["images"]]
    return found


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_every_sample_comes_exactly_once_an_epoch(prepared: Path, cache_bytes: int) -> None:
    keys = _keys(prepared)
    stream = ImageStream(prepared, "train", seed=1, cache_bytes=cache_bytes)
    assert len(stream) == SAMPLES == len(keys)
    seen = [keys[image] for image in _take(stream, 0, 20, 27)]  # six epochs, batches across their borders
    epochs = [seen[start : start + SAMPLES] for start in range(0, 6 * SAMPLES, SAMPLES)]
    assert all(Counter(epoch) == Counter(keys.values()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("threads", "cache_bytes"), [(1, 0), (3, 0), (3, 1 << 20)])
def test_global_order_is_the_same_at_any_number_of_ranks_and_threads(
    prepared: Path, world_size: int, threads: int, cache_bytes: int
) -> None:
    alone = _take(ImageStream(prepared, "train", seed=1), 36, 12, 10)
    options = {"world_size": world_size, "threads": threads, "cache_bytes": cache_bytes}
    ranks = [ImageStream(prepared, "train", seed=1, rank=rank, **options).batches(36, 12) for rank in range(world_size)]
    together = [image.numpy().tobytes() for _ in range(10) for rank in ranks for image in next(rank)["images"]]
    assert together == alone


@pytest.mark.parametrize("consumed", [1, 20, 89, 90, 91, 1_000])
def test_resume_at_any_sample_equals_the_uninterrupted_stream(prepared: Path, consumed: int) -> None:
    whole = _take(ImageStream(prepared, "train", seed=1), 0, 1, 1_020)
    assert _take(ImageStream(prepared, "train", seed=1), consumed, 10, 2) == whole[consumed : consumed + 20]


def test_resume_decodes_nothing_that_it_skips(prepared: Path) -> None:
    stream = ImageStream(prepared, "train", seed=1)
    batches = stream.batches(80, 5)
    next(batches)
    batches.close()
    assert 5 <= stream._known.sum() <= 5 * 7  # this batch and those made ahead


def test_seed_decides_the_order(prepared: Path) -> None:
    first, second = (_take(ImageStream(prepared, "train", seed=seed), 0, SAMPLES, 1) for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)


def test_batch_size_that_ranks_cannot_share_is_an_error(prepared: Path) -> None:
    with pytest.raises(UserError, match="expected batch_size to be a multiple of 4 processes, found 10"):
        ImageStream(prepared, "train", seed=0, rank=0, world_size=4).batches(0, 10)


def test_empty_split_and_missing_shards_are_errors(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'val' holds no samples: raise prepare\.validation_fraction"):
        ImageStream(prepared, "val", seed=0)
    with pytest.raises(UserError, match="run the stage prepare first"):
        ImageStream(tmp_path, "train", seed=0)


def _one_shard(folder: Path, start: int = 0) -> Path:
    config = folder_config(write_folder(folder / "in", 4, start), validation_fraction=0)
    prepare(folder / "out", config, seed=0)
    return folder / "out/train/000000.tar"


def test_cut_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    tar = _one_shard(tmp_path)
    tar.write_bytes(tar.read_bytes()[:3_000])
    with pytest.raises(UserError, match=r"000000\.tar is another file than prepare wrote: expected 20480 bytes"):
        next(ImageStream(tmp_path / "out", "train", seed=0).batches(0, 4))


def test_a_tar_replaced_by_another_of_the_same_name_and_size_is_an_error(tmp_path: Path) -> None:
    tar, other = _one_shard(tmp_path / "one"), _one_shard(tmp_path / "two", start=100)
    assert tar.stat().st_size == other.stat().st_size
    tar.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"000000\.tar is damaged at sample \d: wrong checksum"):
        next(ImageStream(tmp_path / "one/out", "train", seed=0).batches(0, 4))


def test_one_flipped_byte_in_an_image_is_an_error(tmp_path: Path) -> None:
    tar = _one_shard(tmp_path)
    begin, size, _ = np.load(tar.with_suffix(".index.npy"))[2].tolist()
    content = bytearray(tar.read_bytes())
    content[begin + size // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"000000\.tar is damaged at sample 2"):
        next(ImageStream(tmp_path / "out", "train", seed=0).batches(0, 4))


def test_an_abandoned_stream_leaves_no_thread_behind(prepared: Path) -> None:
    before = set(threading.enumerate())  # one of another test may end meanwhile
    batches = ImageStream(prepared, "train", seed=0, cache_bytes=0).batches(0, 10)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before
