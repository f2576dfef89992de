"""Batches are made ahead of their use, by no training thread, and a thread that makes them is no trouble at the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.data import prefetch
from pipeline.data.prefetch import Batch, load

CPU = torch.device("cpu")


def _numbered(made: list[int], wait: Callable[[], object] = lambda: None) -> Iterator[Batch]:
    """Batches 0, 1, …; those that were begun are in `made`."""
    while True:
        wait()
        made.append(len(made))
        yield {"text": torch.tensor([made[-1]]).to(torch.uint16)}


def _soon(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.001)
    return happened()


def test_the_next_batches_are_ready_before_they_are_asked_for() -> None:
    made: list[int] = []
    batches = load(_numbered(made), CPU, count=3)
    for number in range(5):
        assert next(batches)["text"].tolist() == [number]
        # This one, three that wait, and one more that waits for room.
        assert _soon(lambda number=number: len(made) == number + 5)  # type: ignore[misc]
    batches.close()
    assert len(made) == 9


def test_ids_are_narrow_until_they_are_on_the_device_and_all_values_arrive() -> None:
    narrow = {
        "text": torch.tensor([0, 2**16 - 1]).to(torch.uint16),
        "codes": torch.tensor([2**31, 2**32 - 1]).to(torch.uint32),
        "more": torch.tensor([-1, 7], dtype=torch.int32),
        "images": torch.tensor([0, 255], dtype=torch.uint8),
    }
    arrived = next(load((batch for batch in [narrow]), CPU))
    assert {name: tensor.tolist() for name, tensor in arrived.items()} == {
        name: tensor.tolist() for name, tensor in narrow.items()
    }
    assert {tensor.dtype for name, tensor in arrived.items() if name != "images"} == {torch.int64}
    assert arrived["images"].dtype == torch.uint8


def test_what_the_thread_raises_comes_up_where_the_batch_is_asked_for() -> None:
    def damaged() -> Iterator[Batch]:
        yield {"text": torch.zeros(1)}
        raise UserError("train/000001.text.npy is damaged")

    batches = load(damaged(), CPU)
    next(batches)
    with pytest.raises(UserError, match=r"train/000001\.text\.npy is damaged"):
        next(batches)


def test_a_thread_that_hangs_is_left_behind_with_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "_PATIENCE_S", 0.1)
    released, made = threading.Event(), list[int]()
    batches = load(_numbered(made, lambda: made and released.wait()), CPU)
    next(batches)
    batches.close()
    assert "the thread that reads data does not end" in caplog.text
    released.set()
    assert _soon(lambda: not [thread for thread in threading.enumerate() if thread.name == "batches"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_are_what_was_sent() -> None:
    made: list[int] = []
    batches = load(_numbered(made), torch.device("cuda", 0))
    found = [next(batches)["text"] for _ in range(100)]
    assert {(tensor.device.type, tensor.dtype) for tensor in found} == {("cuda", torch.int64)}
    assert torch.cat(found).tolist() == list(range(100))
    batches.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_thread_that_makes_batches_for_a_gpu_is_at_home_on_it_and_takes_no_memory_of_the_first() -> None:
    at: list[int] = []
    batches = load(_numbered([], lambda: at.append(torch.cuda.current_device())), torch.device("cuda", 1))
    assert [next(batches)["text"].device.index for _ in range(10)] == [1] * 10
    batches.close()
    assert set(at) == {1}
