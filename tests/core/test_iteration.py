"""Batches of any iterable."""

from pipeline.core.iteration import batched


def test_batches_hold_every_item_once_and_nothing_is_taken_early() -> None:
    items = iter(range(7))
    batches = batched(items, 3)
    assert next(batches) == [0, 1, 2]
    assert next(items) == 3
    assert list(batches) == [[4, 5, 6]]
    assert list(batched([], 3)) == []
