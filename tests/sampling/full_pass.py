"""Every step of decoding against the model's pass over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.sampling.decode_step import DecodeStep
from pipeline.transformer.layout import Layout


def assert_logits_of_the_full_pass(
    step: DecodeStep, hidden: Tensor, layout: Layout, codes: Tensor, expected: Sequence[Tensor], given: int
) -> None:
    """From code `given` on, the step's logits are the `expected` ones [B, N, V] of each level."""
    for index in range(given, layout.image_length):
        level = layout.level_at(index)
        logits = step.logits(hidden, index)
        torch.testing.assert_close(logits, expected[level][:, index - layout.level_starts[level]], atol=1e-4, rtol=1e-4)
        if index + 1 < layout.image_length:
            hidden = step.read(codes[:, index], index)
