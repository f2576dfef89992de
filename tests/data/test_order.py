from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest

from pipeline.data.order import GlobalOrder, ShardOrder, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 255, 1_000, 4_096, 4_097])
def test_permutation_is_a_bijection(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_permutations_of_many_sizes_and_keys_at_once_equal_those_of_each_alone() -> None:
    sizes = np.array([3, 1_000, 70_000, 2**40 + 1])
    keys = np.array([5, 6, 7, 8], dtype=np.uint64)
    index = np.array([2, 500, 69_999, 2**40])
    together = permute(index, sizes, keys)
    alone = [int(permute(index[i : i + 1], int(sizes[i]), int(keys[i]))[0]) for i in range(4)]
    assert together.tolist() == alone
    assert (together < sizes).all()


def test_permutation_moves_every_sample_to_every_position_about_equally_often() -> None:
    size, keys = 10, 4_000
    index = np.tile(np.arange(size), keys)
    positions = permute(index, size, np.repeat(np.arange(keys, dtype=np.uint64), size))
    counts = np.zeros((size, size))
    np.add.at(counts, (index, positions), 1)
    expected = keys / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # (size - 1)^2 = 81 degrees of freedom; 140 is beyond the 99.99th percentile.
    assert chi_squared < 140


def test_order_is_pinned() -> None:
    # A change of these numbers changes every training run: it must be a decision, not an accident.
    assert permute(np.arange(10), 10, 1).tolist() == [3, 5, 0, 9, 2, 1, 6, 8, 7, 4]
    samples, epochs = ShardOrder([5, 3], seed=0, streams=4).locate(np.arange(8))
    assert samples.tolist() == [3, 4, 1, 5, 0, 2, 6, 7]
    assert epochs.tolist() == [0] * 8
    uneven = [100, 1, 57, 23] * 5
    pinned = {ShardOrder(uneven, seed=3): "99146f578c91da88", GlobalOrder(905, seed=3): "fd061186eed8a0b2"}
    for order, expected in pinned.items():
        samples, _ = order.locate(np.arange(2_000))
        assert sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == expected
    samples, epochs = GlobalOrder(5, seed=0).locate(np.arange(12))
    assert samples.tolist() == [0, 4, 1, 2, 3, 4, 3, 1, 0, 2, 0, 3]
    assert epochs.tolist() == [0] * 5 + [1] * 5 + [2] * 2


@pytest.mark.parametrize("counts", [[1], [3, 1, 1], [100, 1, 57, 23], [7] * 40, [64], [200]])
def test_every_sample_comes_exactly_once_an_epoch_however_uneven_the_shards(counts: list[int]) -> None:
    order = ShardOrder(counts, seed=3)
    everything = [*range(sum(counts))]
    epochs = []
    for epoch in range(3):
        samples, found = order.locate(np.arange(epoch * order.samples, (epoch + 1) * order.samples))
        epochs.append(samples.tolist())
        assert sorted(epochs[-1]) == everything
        assert (found == epoch).all()
    if len(everything) > 10:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_stream_reads_its_shards_one_after_the_other() -> None:
    counts = [50] * 64
    order = ShardOrder(counts, seed=0, streams=8)
    samples, _ = order.locate(np.arange(order.samples))
    shards = samples // 50
    for stream in range(8):
        mine = shards[stream::8]
        assert 1 + np.count_nonzero(np.diff(mine)) == 8  # 64 shards / 8 streams, each opened once


def test_batches_across_an_epoch_border_hold_both_epochs() -> None:
    order = ShardOrder([10, 10], seed=0)
    alone = np.stack([np.concatenate(parts) for parts in zip(*map(order.locate, ([18, 19], [20, 21])), strict=True)])
    together = np.stack(order.locate(np.arange(18, 22)))
    assert (alone == together).all()
