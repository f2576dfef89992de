"""How many images are drawn at once: as many as were asked for, or as fit into the free memory of the GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.transformer.layout import Layout

log = logging.getLogger(__name__)
One = TypeVar("One")
Drawn = TypeVar("Drawn")
_USABLE = 0.9  # of what is free: kernels want room to work in, and memory is cut into pieces
_LOGITS = 8  # times that a row of float32 logits is there at once, between the head and the drawn code


def bytes_per_image(layout: Layout, shape: TransformerShape, element_bytes: int, guided: bool) -> int:
    """Memory of one image while its codes are drawn: keys and values of its sequence and its prompt's, and logits.

    Args:
        element_bytes: of a number in the cache: 2 in bf16, 4 in float32.
        guided: with an unprompted row beside the prompted one.
    """
    of_position = 2 * shape.layers * shape.key_value_heads * shape.head_width * element_bytes
    positions = layout.length + layout.text_length + 1
    logits = 4 * _LOGITS * max(level.codebook_size for level in layout.levels)
    return (2 if guided else 1) * (of_position * positions + logits)


def free_bytes(device: torch.device) -> int | None:
    """What this process can still get on a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def batch_that_fits(batch_size: int, image_bytes: int, free: int | None) -> int:
    """`batch_size`, or less with a warning.

    Raises:
        UserError: not one image fits.
    """
    if free is None or batch_size * image_bytes <= _USABLE * free:
        return batch_size
    fits = int(_USABLE * free) // image_bytes
    needs = f"an image needs {_gigabytes(image_bytes)} of GPU memory while it is drawn, {_gigabytes(free)} are free"
    if not fits:
        raise UserError(f"batch_size: {needs}, so not one fits; end what else uses the GPU, or set dtype=bf16")
    log.warning("%s: %d images are drawn at once, instead of batch_size=%d", needs, fits, batch_size)
    return fits


def in_batches(
    items: Sequence[One], batch_size: int, draw: Callable[[Sequence[One]], Drawn]
) -> Iterator[tuple[Sequence[One], Drawn]]:
    """`draw` of `batch_size` items at a time; once memory has run out, of half as many.

    Raises:
        UserError: memory has run out again, or one item was too much.
    """
    start, size = 0, batch_size
    while start < len(items):
        batch = items[start : start + size]
        try:
            drawn = draw(batch)
        except torch.OutOfMemoryError as error:
            if size < batch_size or len(batch) == 1:
                smaller = f"set batch_size to {len(batch) // 2}" if len(batch) > 1 else "set dtype=bf16"
                raise UserError(
                    f"batch_size: {len(batch)} images at once do not fit into the memory of the GPU; {smaller},"
                    " or end what else uses it"
                ) from error
            size = len(batch) // 2
            log.warning("GPU memory ran out with %d images at once: from here on %d at once", len(batch), size)
            continue
        yield batch, drawn
        start += len(batch)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
