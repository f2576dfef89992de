"""Promises of pipeline/transformer/attention.py: every backend computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention import Backend, attend, choose_backend
from pipeline.transformer.attention_patterns import Pattern
from pipeline.transformer.layout import Layout
from pipeline.transformer.tables import Tables
from tests.transformer.test_attention_patterns import FIGURE, SPARSE, TWO_LEVELS, expected_mask

SCALE = 0.3


def tables_of(layout: Layout) -> Tables:
    return Tables(layout, TransformerShape(width=64, heads=4, conv_kernel=3), torch.device("cpu"))


def drawn(layout: Layout, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [2, 4, S, 16], keys and values [2, kv_heads, S, 16]."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, layout.length, 16)
    return query, torch.randn(2, kv_heads, layout.length, 16), torch.randn(2, kv_heads, layout.length, 16)


def softmax_over_the_papers_image(query: Tensor, key: Tensor, value: Tensor, pattern: str, layout: Layout) -> Tensor:
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ keys.transpose(-1, -2) * SCALE
    return scores.masked_fill(~expected_mask(pattern, layout), float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize("layout", [FIGURE, TWO_LEVELS])
@pytest.mark.parametrize("pattern", ["full", *SPARSE])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", ["sdpa", "math", "flex"])
def test_every_backend_is_a_softmax_over_what_the_papers_image_allows(
    backend: Backend, pattern: Pattern, layout: Layout, kv_heads: int
) -> None:
    query, key, value = drawn(layout, kv_heads)
    found = attend(query, key, value, SCALE, pattern, tables_of(layout), backend)
    expected = softmax_over_the_papers_image(query, key, value, pattern, layout)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [FIGURE, TWO_LEVELS])
@pytest.mark.parametrize("pattern", ["full", *SPARSE])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_a_part_of_the_positions_sees_the_cached_ones_before_it(
    backend: Backend, pattern: Pattern, layout: Layout, kv_heads: int
) -> None:
    query, key, value = drawn(layout, kv_heads)
    tables = tables_of(layout)
    expected = softmax_over_the_papers_image(query, key, value, pattern, layout)
    for start, end in [(i, i + 1) for i in range(layout.length)] + [(0, 7), (4, layout.length), (5, 9)]:
        found = attend(query[:, :, start:end], key[:, :, :end], value[:, :, :end], SCALE, pattern, tables, backend)
        torch.testing.assert_close(found, expected[:, :, start:end], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["full", *SPARSE])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_backends_that_can_train_on_cpus_have_the_same_gradients(pattern: Pattern, kv_heads: int) -> None:
    gradients = []
    backends: list[Backend] = ["sdpa", "math"]
    for backend in backends:
        inputs = [x.requires_grad_() for x in drawn(TWO_LEVELS, kv_heads)]
        mixed = attend(inputs[0], inputs[1], inputs[2], SCALE, pattern, tables_of(TWO_LEVELS), backend)
        gradients.append(torch.autograd.grad(mixed.square().sum(), inputs))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_backend_follows_device_gradient_and_length() -> None:
    for pattern in ("full", *SPARSE):
        assert choose_backend("cpu", pattern, 9, whole_sequence=True, training=True) == "math"
        for queries, training in ((9, False), (1, False), (1, True)):
            assert choose_backend("cpu", pattern, queries, whole_sequence=queries == 9, training=training) == "sdpa"
    for pattern in SPARSE:
        assert choose_backend("cuda", pattern, 9, whole_sequence=True, training=True) == "flex"
        assert choose_backend("cuda", pattern, 9, whole_sequence=False, training=False) == "sdpa"
    assert choose_backend("cuda", "full", 9, whole_sequence=True, training=True) == "sdpa"
