"""Hundreds of processes that restore a checkpoint: what each of them opens and reads, counted.

The processes are threads here, with collectives of their own; the files are those that 512 processes of ZeRO-3 write.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.atomic_io import write_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import record
from pipeline.core.tensor_file import TensorLayout, write_tensors
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.engines import zero_partitions
from pipeline.training.engines.zero_partitions import Partition, Span, shard_of
from pipeline.training.sharded_state import ShardedState, TensorShard, shards_file

pytestmark = pytest.mark.slow
T = TypeVar("T")
WRITERS = 512
PARAMETERS = {"embedding.weight": 512 * 2048 + 17, "blocks.0.attention.weight": 512 * 1024, "blocks.0.norm": 700}
STATES = ("exp_avg", "exp_avg_sq")
HEADERS = 10_000  # bytes: of the files that a process hashes and reads, here a tenth of them
BLOCK = 640  # bytes: about as many a file as of 12 G parameters


class Threads:
    """`count` ranks, each a thread: pipeline.core.distributed for them, and what each of them opened and read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.opened: Counter[int] = Counter()
        self.looked_at: Counter[int] = Counter()
        self.bytes_read = [0] * count
        self._own = threading.local()
        self._all_here = threading.Barrier(count)
        self._values: list[object] = [None] * count

    @property
    def rank(self) -> int | None:
        return getattr(self._own, "rank", None)

    def exchanged(self, value: T) -> list[T]:
        self._values[self._own.rank] = value
        self._all_here.wait()
        values = list(self._values)
        self._all_here.wait()
        return values

    def run(self, work: Callable[[], None]) -> list[Exception]:
        """Work as each rank, to the end; the errors."""
        errors: list[Exception] = []

        def as_rank(rank: int) -> None:
            self._own.rank = rank
            before = _bytes_read()
            try:
                work()
            except Exception as error:
                errors.append(error)
            self.bytes_read[rank] = _bytes_read() - before

        threads = [threading.Thread(target=as_rank, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors


def _bytes_read() -> int:
    """By this thread, from the system."""
    with open("/proc/thread-self/io", buffering=1000) as file:
        return int(file.readline().split()[1])


_counted: list[Threads] = []  # those whose opening is counted now


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    def count(event: str, arguments: tuple[object, ...]) -> None:
        if _counted and event in ("open", "os.listdir", "os.scandir") and "step-" in str(arguments[0]):
            _counted[0].opened[_counted[0].rank or 0] += 1

    sys.addaudithook(count)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Threads]]:
    """Makes this process's threads so many ranks."""
    stat = os.stat

    def made(count: int) -> Threads:
        threads = Threads(count)

        def counted_stat(path: object, **options: object) -> os.stat_result:
            threads.looked_at[threads.rank or 0] += "step-" in str(path)
            return stat(path, **options)

        monkeypatch.setattr(os, "stat", counted_stat)
        monkeypatch.setattr(distributed, "rank", lambda: threads.rank or 0)
        monkeypatch.setattr(distributed, "world_size", lambda: count)
        monkeypatch.setattr(distributed, "all_gather_objects", threads.exchanged)
        monkeypatch.setattr(distributed, "gather_objects", threads.exchanged)
        monkeypatch.setattr(distributed, "broadcast_object", lambda value: threads.exchanged(value)[0])
        _counted[:] = [threads]
        return threads

    yield made
    _counted.clear()


def _values(kind: int, start: int, length: int) -> Tensor:
    return torch.arange(start, start + length, dtype=torch.float32) * 4 + kind


def _spans(ranks: int) -> list[Span]:
    """What ZeRO-3 has on this rank."""
    spans, offset = [], 0
    for name, numel in PARAMETERS.items():
        start, length = shard_of(numel, -(-numel // ranks))
        if length:
            spans.append(Span(name, start, offset, length))
            offset += length
    return spans


def _tensors(spans: list[Span]) -> list[Tensor]:
    """Weights, states and average: each as one flat tensor."""
    return [torch.cat([_values(kind, span.start, span.length) for span in spans]) for kind in range(4)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint after one step, of 512 processes."""
    directory = tmp_path_factory.mktemp("checkpoints") / "step-00000001"
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: None)
        records = {}
        for rank in range(WRITERS):
            patched.setattr(distributed, "rank", lambda rank=rank: rank)
            spans = _spans(WRITERS)
            weights, *moments, average = _tensors(spans)
            states: dict[str, object] = dict(zip(STATES, moments, strict=True))
            training = list(zero_partitions.local_shards(Partition(weights, spans), states | {"step": 7}))
            averages = [TensorShard(s.name, s.start, average[s.offset : s.offset + s.length]) for s in spans]
            for name, tensors in (shards_file("training", training), shards_file("ema", averages)):
                layouts = {key: TensorLayout.of(tensor) for key, tensor in tensors.items()}
                records[name] = write_tensors(directory / name, layouts, tensors.__getitem__, BLOCK)
    write_json(directory / "trainer.json", {"step": 1})
    records["trainer.json"] = record(directory / "trainer.json")
    write_json(directory / "manifest.json", {"step": 1, "files": records})
    return directory.parent


def _restore(checkpoints: Checkpoints) -> int:
    """As one rank, what an engine and the trainer do. Everything must be there; the bytes that it needed."""
    spans = _spans(distributed.world_size())
    flat = torch.zeros(sum(span.length for span in spans))
    states: dict[str, object] = {}
    average = torch.zeros_like(flat)

    def read(directory: Path) -> None:
        zero_partitions.read_shards(Partition(flat, spans), states, ShardedState(directory, "training"))
        ema = ShardedState(directory, "ema")
        for span in spans:
            ema.read_into(span.name, span.start, average[span.offset : span.offset + span.length])

    assert checkpoints.restore(read) == 1
    assert states.pop("step") == 7
    for expected, found in zip(_tensors(spans), (flat, *states.values(), average), strict=True):
        assert isinstance(found, Tensor)
        assert torch.equal(found, expected)
    return 4 * 4 * flat.numel()


@pytest.mark.parametrize("readers", [512, 384])
def test_a_process_reads_twice_what_it_needs_and_opens_and_looks_at_its_share(
    readers: int, saved: Path, ranks: Callable[[int], Threads]
) -> None:
    threads, needed, checkpoints = ranks(readers), [0] * readers, Checkpoints(saved, keep=1)

    def work() -> None:
        needed[distributed.rank()] = _restore(checkpoints)

    assert threads.run(work) == []
    # Rank 0 reads the manifest for all, and the last one needs less, of tensors that processes do not divide.
    assert max(threads.bytes_read[1:]) < 2 * max(needed) + BLOCK + HEADERS
    assert max(threads.opened.values()) < 16
    assert max(threads.looked_at.values()) < 16


def test_damage_in_the_share_of_one_is_told_to_all_before_anything_is_read(
    saved: Path, tmp_path: Path, ranks: Callable[[int], Threads]
) -> None:
    shutil.copytree(saved, tmp_path / "damaged")
    damaged = tmp_path / "damaged/step-00000001/ema-00317.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    threads, checkpoints = ranks(384), Checkpoints(tmp_path / "damaged", keep=1)
    read: list[Path] = []

    def restore() -> None:
        checkpoints.restore(read.append)

    errors = threads.run(restore)
    assert len(errors) == 384
    assert {type(error) for error in errors} == {UserError}
    assert all("ema-00317.safetensors: expected sha256" in str(error) for error in errors)
    assert read == []
