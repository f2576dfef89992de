from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.core.level import Level
from pipeline.data import sampler
from pipeline.data import token_parts as token_parts_module
from pipeline.data.order import GlobalOrder
from pipeline.data.prepare import prepare
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import read_samples
from pipeline.data.token_blocks import RECORD
from pipeline.data.token_parts import part_name, token_parts
from pipeline.data.tokenize_shards import Encoders, TokenizeJob, join, tokenize_shards
from pipeline.data.tokens import TokenArrays
from tests.data.caption_encoders import failing, numbered, own_process
from tests.data.sample_images import folder_config, tree_bytes, write_folder

SAMPLES = 70


def _encode_images(images: torch.Tensor) -> list[torch.Tensor]:
    """A real, if small, two-level tokenizer: mean brightness of 2x2 and 4x4 patches, in 16 and 70,000 steps."""
    grey = images.mean(dim=1, keepdim=True)
    coarse, fine = (torch.nn.functional.adaptive_avg_pool2d(grey, side).flatten(1) for side in (2, 4))
    return [(coarse * 15.99).long(), (fine * 69_999).long()]


def _encode_text(captions: list[str]) -> torch.Tensor:
    ids = [[1 + int(c) if c.isdigit() else 20 for c in caption.split()[-1].rjust(3)] for caption in captions]
    return torch.tensor(ids)


ENCODERS = Encoders(
    encode_images=_encode_images,
    encode_text=_encode_text,
    levels=[Level(2, 2, 16), Level(4, 4, 70_000)],
    text_length=3,
    text_vocab_size=21,
    hashes={"image-tokenizer": "a", "text-tokenizer": "b"},
)


def _tokenize(prepared: Path, out: Path, config: TokenizeConfig, encoders: Encoders = ENCODERS) -> list[bool]:
    job = TokenizeJob(out, prepared, encoders, config, seed=0)
    made = list(tokenize_shards(job, token_parts(prepared)))
    join(job)
    return made


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokens")
    config = folder_config(write_folder(directory / "in", SAMPLES), shard_size=25, validation_fraction=0.1)
    prepare(directory / "out", config, seed=0)
    return directory / "out"


@pytest.fixture(scope="module")
def tokenized(prepared: Path) -> Path:
    config = TokenizeConfig(crops=3, batch_size=8)
    _tokenize(prepared, prepared.parent / "tokens", config)
    return prepared.parent / "tokens"


def test_arrays_hold_what_the_tokenizers_say_for_every_sample(prepared: Path, tokenized: Path) -> None:
    for split in ("train", "val"):
        samples = list(read_samples(prepared, split))
        arrays = TokenArrays(tokenized, split)
        assert len(arrays) == len(samples)
        assert arrays.keys(np.arange(len(samples))) == [s.key for s in samples]
        text, codes = arrays.gather(np.arange(len(samples)), np.zeros(len(samples), np.int64))
        images = torch.from_numpy(np.stack([np.asarray(s.image) for s in samples])).permute(0, 3, 1, 2).float() / 255
        assert (codes == torch.cat(_encode_images(images), dim=1).numpy()).all()
        assert (text == _encode_text([s.caption for s in samples]).numpy()).all()
        arrays.verify()


def test_codes_are_stored_as_narrow_as_they_fit(tokenized: Path) -> None:
    index = json.loads((tokenized / "index.json").read_text())["splits"]["train"]
    codes = 2 * 4 + 4 * 16  # bytes: 4 below 16, 16 below 70,000
    ids = index["samples"] * (2 * 3 + 3 * codes)
    texts = index["samples"] * 40  # where keys and captions end, and these
    assert ids < index["bytes"] < ids + texts


def test_random_crops_differ_from_the_whole_and_validation_has_none(tokenized: Path) -> None:
    arrays = TokenArrays(tokenized, "train")
    every = np.arange(len(arrays))
    fine = [arrays.gather(every, np.full(len(every), crop))[1][:, 4:] for crop in range(3)]
    assert (fine[0] != fine[1]).any(axis=1).all()
    assert (fine[1] != fine[2]).any(axis=1).all()
    assert TokenArrays(tokenized, "val").crops == 1


def test_finished_shards_are_never_computed_twice_and_damaged_ones_are(prepared: Path, tmp_path: Path) -> None:
    config = TokenizeConfig()
    assert all(_tokenize(prepared, tmp_path, config))
    before = tree_bytes(tmp_path)
    assert not any(_tokenize(prepared, tmp_path, config))
    array = tmp_path / "train/001.tokens"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=r"train/001\.tokens is damaged"):
        TokenArrays(tmp_path, "train").verify()
    assert sum(_tokenize(prepared, tmp_path, config)) == 1
    assert tree_bytes(tmp_path) == before


def test_arrays_that_two_runs_share_stay_what_they_are_when_one_of_them_makes_its_own_again(
    prepared: Path, tmp_path: Path
) -> None:
    _tokenize(prepared, tmp_path / "a", TokenizeConfig())
    before = tree_bytes(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    other = replace(ENCODERS, encode_images=lambda images: _encode_images(1 - images), hashes=dict.fromkeys("ab", "c"))
    assert all(_tokenize(prepared, tmp_path / "b", TokenizeConfig(), other))
    assert tree_bytes(tmp_path / "a") == before
    TokenArrays(tmp_path / "b", "train").verify()


def test_another_tokenizer_makes_all_shards_again(prepared: Path, tmp_path: Path) -> None:
    _tokenize(prepared, tmp_path, TokenizeConfig())
    other = replace(ENCODERS, hashes={"image-tokenizer": "c", "text-tokenizer": "b"})
    with pytest.raises(UserError, match=r"expected the tokens of train/000000\.tar"):
        join(TokenizeJob(tmp_path, prepared, other, TokenizeConfig(), seed=0))
    assert all(_tokenize(prepared, tmp_path, TokenizeConfig(), other))


def test_a_code_out_of_range_is_an_error(prepared: Path, tmp_path: Path) -> None:
    small = replace(ENCODERS, levels=[Level(2, 2, 4), Level(4, 4, 70_000)])
    with pytest.raises(UserError, match=r"expected codes in \[0, 4\)"):
        _tokenize(prepared, tmp_path, TokenizeConfig(), small)


def _rows(sampler: TokenSampler, consumed: int, batch_size: int, batches: int) -> list[bytes]:
    found = []
    for batch in islice(sampler.batches(consumed, batch_size), batches):
        assert batch["codes"].dtype == batch["text"].dtype == torch.int64
        found += [t.numpy().tobytes() for t in batch["text"]]
    return found


def test_sampler_gives_every_sample_once_an_epoch(tokenized: Path) -> None:
    sampler = TokenSampler(tokenized, "train", seed=0)
    count = len(sampler)
    rows = _rows(sampler, 0, 1, 4 * count)
    epochs = [tuple(rows[start : start + count]) for start in range(0, 4 * count, count)]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == count for epoch in epochs)
    assert len(set(epochs)) == 4


def test_sampler_takes_every_crop_in_turn(tokenized: Path) -> None:
    sampler = TokenSampler(tokenized, "train", seed=0)
    count = len(sampler)
    codes = torch.cat([b["codes"] for b in islice(sampler.batches(0, count), 3)]).numpy()
    assert len({row.tobytes() for row in codes}) == 3 * count


@pytest.mark.parametrize("world_size", [2, 4])
def test_sampler_order_is_the_same_at_any_number_of_ranks(tokenized: Path, world_size: int) -> None:
    alone = _rows(TokenSampler(tokenized, "train", seed=0), 24, 12, 20)
    ranks = [
        TokenSampler(tokenized, "train", seed=0, rank=rank, world_size=world_size).batches(24, 12)
        for rank in range(world_size)
    ]
    assert [t.numpy().tobytes() for _ in range(20) for rank in ranks for t in next(rank)["text"]] == alone


def test_sampler_resumes_at_any_sample(tokenized: Path) -> None:
    whole = _rows(TokenSampler(tokenized, "train", seed=0), 0, 1, 300)
    for consumed in (1, 63, 64, 200):
        assert _rows(TokenSampler(tokenized, "train", seed=0), consumed, 10, 3) == whole[consumed : consumed + 30]


def test_a_billion_samples_start_anywhere_at_once() -> None:
    started = time.perf_counter()
    for consumed in (0, 10**9 - 32, 10**12):
        samples, _ = GlobalOrder(10**9, seed=0).locate(np.arange(consumed, consumed + 64))
        assert len(np.unique(samples)) == 64
    assert time.perf_counter() - started < 1


def test_more_shards_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    config = folder_config(write_folder(tmp_path / "in", 50), shard_size=1, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    _tokenize(tmp_path / "out", tmp_path / "tokens", TokenizeConfig())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
    try:
        rows = _rows(TokenSampler(tmp_path / "tokens", "train", seed=0), 0, 10, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(Counter(rows).values()) == {2}


def test_as_many_files_stay_mapped_as_the_limit_of_open_files_has_room_for(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, mapped in ((1024, 256), (60_000, 15_000)):  # of 512 at most
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert TokenArrays(tokenized, "train")._mapped.cache_info().maxsize == mapped


def test_a_flipped_byte_is_found_at_the_start_of_a_stage_and_named(prepared: Path, tmp_path: Path) -> None:
    _tokenize(prepared, tmp_path, TokenizeConfig())
    sampler = TokenSampler(tmp_path, "train", seed=0)
    sampler.verify()
    array = tmp_path / "train/001.tokens"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=r"train/001\.tokens is damaged between bytes 0 and \d+: expected"):
        sampler.verify()


def test_a_cut_array_is_an_error_that_names_it(prepared: Path, tmp_path: Path) -> None:
    _tokenize(prepared, tmp_path, TokenizeConfig())
    array = tmp_path / "train/001.tokens"
    array.write_bytes(array.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"train/001\.tokens is damaged: expected \d+ bytes, found"):
        _rows(TokenSampler(tmp_path, "train", seed=0), 0, SAMPLES, 1)


def test_blocks_of_many_shards_lie_in_few_files_and_hold_the_same(
    prepared: Path, tokenized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_parts_module, "PARTS", 2)
    _tokenize(prepared, tmp_path, TokenizeConfig(crops=3, batch_size=8))
    assert sorted(path.name for path in (tmp_path / "train").glob("*.tokens")) == ["000.tokens", "001.tokens"]
    alone, together = TokenArrays(tokenized, "train"), TokenArrays(tmp_path, "train")
    assert (alone.shards, together.shards) == (3, 3)
    samples, crops = np.arange(len(alone)), np.arange(len(alone)) % 3
    for own, other in zip(alone.gather(samples, crops), together.gather(samples, crops), strict=True):
        assert (own == other).all()
    assert alone.keys(samples) == together.keys(samples)
    assert alone.captions(samples) == together.captions(samples)


def test_arrays_of_an_earlier_version_are_told_in_a_line(tokenized: Path, tmp_path: Path) -> None:
    index = json.loads((tokenized / "index.json").read_text())
    del index["format"]  # the first had none
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"format 2, found those of another version: remove .*_SUCCESS and run the"):
        TokenArrays(tmp_path, "train")


def test_batches_are_there_while_arrays_are_compared_and_tell_what_was_found(prepared: Path, tmp_path: Path) -> None:
    _tokenize(prepared, tmp_path, TokenizeConfig())
    sampler = TokenSampler(tmp_path, "train", seed=0)
    sampler.verify_behind()
    next(sampler.batches(0, 8))
    sampler.verify()
    array = tmp_path / "train/002.tokens"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    sampler.verify_behind()
    deadline = time.monotonic() + 60
    in_time = takewhile(lambda _: time.monotonic() < deadline, sampler.batches(0, 8))
    with pytest.raises(UserError, match=r"train/002\.tokens is damaged .*since this start may have learned from it"):
        for _ in in_time:
            pass
    with pytest.raises(UserError, match=r"train/002\.tokens is damaged"):
        sampler.verify()


def test_index_names_tokenizers_and_checksums(tokenized: Path) -> None:
    index = json.loads((tokenized / "index.json").read_text())
    assert index["tokenizers"] == ENCODERS.hashes
    content = (tokenized / "train.shards").read_bytes()
    assert hashlib.sha256(content).hexdigest() == index["splits"]["train"]["sha256"]
    for record in np.frombuffer(content, RECORD):
        block = (tokenized / part_name("train", record["part"])).read_bytes()
        assert hashlib.sha256(block[record["begin"] :][: record["bytes"]]).digest() == record["sha256"].tobytes()


def test_nothing_of_a_batch_is_made_in_the_training_thread(tokenized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    gather = TokenArrays.gather

    def noted(*arguments: Any) -> Any:
        threads.add(threading.current_thread())
        return gather(*arguments)

    monkeypatch.setattr(TokenArrays, "gather", noted)
    batches = TokenSampler(tokenized, "train", seed=0).batches(0, 8)
    next(batches)
    batches.close()
    assert threads
    assert threading.current_thread() not in threads
    assert not threads & set(threading.enumerate())  # it ends with the batches


def test_captions_are_encoded_in_other_processes_that_end_with_the_batches(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "processors", lambda: 3)
    batches = TokenSampler(tokenized, "train", seed=0, encode_caption=own_process).batches(0, 8)
    processes = {high * 2**16 + low for high, low, _ in next(batches)["text"].tolist()}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert all(psutil.pid_exists(process) for process in processes)
    batches.close()
    assert not any(psutil.pid_exists(process) for process in processes)


@pytest.mark.parametrize("processors", [1, 2])
def test_a_caption_that_cannot_be_encoded_is_an_error_of_the_training(
    processors: int, tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "processors", lambda: processors)
    with pytest.raises(UserError, match="no ids for"):
        next(TokenSampler(tokenized, "train", seed=0, encode_caption=failing).batches(0, 8))


def test_arrays_are_gathered_as_narrow_as_they_lie_on_disk(tokenized: Path) -> None:
    batch = next(TokenSampler(tokenized, "train", seed=0)._batches(0, 8, 8))
    assert (batch["text"].dtype, batch["codes"].dtype) == (torch.uint16, torch.uint32)  # 21 and 70,000 ids


def test_captions_encoded_in_training_depend_on_epoch_and_sample_and_on_nothing_else(
    tokenized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(world_size: int, count: int) -> list[tuple[int, ...]]:
        ranks = [
            TokenSampler(tokenized, "train", 5, rank=rank, world_size=world_size, encode_caption=numbered)
            for rank in range(world_size)
        ]
        parts = [list(islice(one.batches(0, 8), count)) for one in ranks]
        return [tuple(row) for batch in zip(*parts, strict=True) for part in batch for row in part["text"].tolist()]

    monkeypatch.setattr(sampler, "processors", lambda: 1)
    one = rows(1, 20)
    monkeypatch.setattr(sampler, "processors", lambda: 4)
    assert one == rows(2, 20)  # ranks, and processes that encode
    samples = len(TokenSampler(tokenized, "train", 5))
    plain = next(TokenSampler(tokenized, "train", 5).batches(0, 8))["codes"]
    assert torch.equal(plain, next(TokenSampler(tokenized, "train", 5, encode_caption=numbered).batches(0, 8))["codes"])
    first, second = dict(row[:2] for row in one[:samples]), dict(row[:2] for row in one[samples : 2 * samples])
    assert first.keys() >= second.keys() & first.keys()
    assert sum(first[name] == second[name] for name in second) == 0  # another draw each epoch


def test_captions_are_kept_and_cut_ones_counted(prepared: Path, tmp_path: Path) -> None:
    encoders = replace(ENCODERS, count_text=lambda captions: [4 for _ in captions])
    _tokenize(prepared, tmp_path, TokenizeConfig(), encoders)
    arrays = TokenArrays(tmp_path, "train")
    assert arrays.captions(np.arange(len(arrays))) == [sample.caption for sample in read_samples(prepared, "train")]
    splits = json.loads((tmp_path / "index.json").read_text())["splits"]
    assert splits["train"]["captions_cut"] == len(arrays)


def test_arrays_of_other_tokenizers_or_of_another_vocabulary_are_told_in_a_line(tokenized: Path) -> None:
    arrays, hashes = TokenArrays(tokenized, "train"), dict(ENCODERS.hashes)
    fitting = (3, 21, list(ENCODERS.levels))
    arrays.check_made_by(hashes, fitting)
    with pytest.raises(UserError, match="expected token arrays of the text-tokenizer c, found those of b: run"):
        arrays.check_made_by(hashes | {"text-tokenizer": "c"}, fitting)
    with pytest.raises(UserError, match=r"expected token arrays for .*\(3, 22, .*found \(3, 21, "):
        arrays.check_made_by(hashes, (3, 22, fitting[2]))
