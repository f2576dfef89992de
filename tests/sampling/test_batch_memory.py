"""Promises of pipeline/sampling/batch_memory.py: a batch that does not fit is told, and made smaller."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.sampling.batch_memory import batch_that_fits, bytes_per_image, in_batches
from pipeline.sampling.static_step import static_length
from tests.transformer.test_model import LAYOUTS, built


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("guided", [False, True])
def test_an_image_takes_the_cache_of_its_sequence_and_prompt_and_its_logits(kv_heads: int, guided: bool) -> None:
    layout = LAYOUTS[1]
    model = built(layout, kv_heads=kv_heads)
    rows = 2 if guided else 1
    caches = [model.new_cache(rows), model.new_cache(rows, layout.text_length + 1)]
    held = sum(layer.keys.nbytes + layer.values.nbytes for cache in caches for layer in cache)
    logits = rows * 4 * 8 * max(level.codebook_size for level in layout.levels)
    assert bytes_per_image(layout, model.shape, 4, guided) == held + logits
    assert layout.length <= static_length(layout.length) < layout.length + 64


def test_a_batch_that_does_not_fit_is_lowered_to_what_does_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert batch_that_fits(64, 10**9, None) == 64  # of a CPU nothing is known
    assert batch_that_fits(8, 10**9, 10 * 10**9) == 8
    assert not caplog.text
    assert batch_that_fits(64, 10**9, 10 * 10**9) == 9
    assert "an image needs 1.00 GB of GPU memory while it is drawn, 10.00 GB are free: 9 images" in caplog.text
    with pytest.raises(UserError, match=r"an image needs 1\.00 GB .*, 1\.00 GB are free, so not one fits"):
        batch_that_fits(64, 10**9, 10**9)


def drawn(items: Sequence[int], batch_size: int, fits: int) -> list[tuple[list[int], int]]:
    def draw(batch: Sequence[int]) -> int:
        if len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(batch)

    return [(list(batch), result) for batch, result in in_batches(items, batch_size, draw)]


def test_memory_that_runs_out_halves_the_batch_once_and_then_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    assert drawn(range(5), 4, fits=4) == [([0, 1, 2, 3], 4), ([4], 1)]
    assert not caplog.text
    assert drawn(range(5), 4, fits=2) == [([0, 1], 2), ([2, 3], 2), ([4], 1)]
    assert "GPU memory ran out with 4 images at once: from here on 2 at once" in caplog.text
    with pytest.raises(UserError, match="2 images at once do not fit into the memory of the GPU; set batch_size to 1,"):
        drawn(range(5), 4, fits=1)
    with pytest.raises(UserError, match="1 images at once do not fit into the memory of the GPU; set dtype=bf16"):
        drawn(range(5), 1, fits=0)
