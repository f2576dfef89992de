"""Promises of pipeline/transformer/tables.py: FlexAttention's blocks, and what masks cost to make."""

from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention import attend
from pipeline.transformer.attention_patterns import Pattern, mask_mod, reordered
from pipeline.transformer.layout import Layout
from pipeline.transformer.tables import Tables

CPU = torch.device("cpu")
SMALL_IMAGE = Layout.of(256, 16384, [(32, 32, 8192)])
HUGE_IMAGE = Layout.of(128, 16384, [(128, 128, 8192)])
LARGE_IMAGE = Layout.of(128, 16384, [(64, 64, 8192)])
TWO_LEVELS = Layout.of(100, 40, [(16, 16, 512), (32, 32, 512)])
ODD = Layout.of(5, 40, [(3, 4, 16)])


def tables_of(layout: Layout, device: torch.device = CPU) -> Tables:
    return Tables(layout, TransformerShape(width=64, heads=4, conv_kernel=11), device)


def blocks(mask: BlockMask) -> int:
    assert mask.full_kv_num_blocks is not None
    return int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())


class PeakMemory(TorchDispatchMode):
    """Counts bytes of the tensors that operations make inside, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(one, Tensor) and (key := one.untyped_storage()._cdata) not in self._seen:
                size = one.untyped_storage().nbytes()
                self._seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(one, self._drop, key, size)
        return made

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@pytest.mark.parametrize(
    ("layout", "full", "row", "convolution"), [(SMALL_IMAGE, 55, 40, 45), (LARGE_IMAGE, 561, 126, 183)]
)
def test_column_layers_skip_as_many_blocks_as_row_layers(layout: Layout, full: int, row: int, convolution: int) -> None:
    tables = tables_of(layout)
    expected = {"full": full, "row": row, "column": row, "convolution": convolution}
    patterns: tuple[Pattern, ...] = ("full", "row", "column", "convolution")
    assert {pattern: blocks(tables.block_mask(pattern)) for pattern in patterns} == expected


def test_column_layers_skip_blocks_of_each_of_several_levels() -> None:
    assert blocks(tables_of(TWO_LEVELS).block_mask("full")) == 66
    assert blocks(tables_of(TWO_LEVELS).block_mask("column")) == blocks(tables_of(TWO_LEVELS).block_mask("row")) == 45


@pytest.mark.parametrize("layout", [SMALL_IMAGE, TWO_LEVELS, ODD])
@pytest.mark.parametrize("pattern", ["full", "row", "column", "convolution"])
def test_block_masks_are_torchs_own(layout: Layout, pattern: Pattern) -> None:
    tables = tables_of(layout)
    mask = mask_mod(pattern, layout, 11, CPU)
    if pattern == "column":
        mask = reordered(mask, tables.column_major()[0])
    found = tables.block_mask(pattern)
    expected = create_block_mask(mask, None, None, layout.length, layout.length, device="cpu")
    assert found.seq_lengths == expected.seq_lengths
    for name in ("kv", "full_kv", "q", "full_q"):
        numbers, wanted = getattr(found, f"{name}_num_blocks"), getattr(expected, f"{name}_num_blocks")
        assert torch.equal(numbers, wanted)
        for row, count in enumerate(numbers.flatten().tolist()):
            chosen = [getattr(one, f"{name}_indices")[0, 0, row, :count] for one in (found, expected)]
            assert torch.equal(*chosen)


@pytest.mark.parametrize("layout", [ODD, TWO_LEVELS])
def test_column_order_keeps_text_and_levels_in_place_and_is_undone(layout: Layout) -> None:
    order, inverse = tables_of(layout).column_major()
    assert torch.equal(order[inverse], torch.arange(layout.length))
    starts = [0, *(layout.text_length + 1 + start for start in layout.level_starts), layout.length]
    for begin, end in pairwise(starts):
        assert sorted(order[begin:end].tolist()) == list(range(begin, end))
    if layout is ODD:  # 3 rows of 4 codes after 5 of text and the start; the last code is not read
        assert order[6:].tolist() == [6, 10, 14, 7, 11, 15, 8, 12, 16, 9, 13]


def test_queries_keys_and_values_in_column_order_have_the_gradients_of_plain_indexing() -> None:
    from pipeline.transformer.attention import _InOrder

    order, inverse = tables_of(ODD).column_major()
    x = torch.randn(2, 3, ODD.length, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    plain = torch.autograd.grad((x[:, :, order] * weight).sum(), x)
    found = torch.autograd.grad((_InOrder.apply(x, order, inverse) * weight).sum(), x)
    assert torch.equal(found[0], plain[0])


def test_sparse_attention_is_one_graph_for_the_compiler() -> None:
    tables = tables_of(ODD)
    query, key, value = torch.randn(3, 2, 4, ODD.length, 16).unbind()
    tables.block_mask("column")  # made outside, as the model does
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    found = compiled(query, key, value, 0.25, "column", tables, "flex")
    torch.testing.assert_close(found, attend(query, key, value, 0.25, "column", tables, "sdpa"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "pattern"), [(LARGE_IMAGE, "column"), (LARGE_IMAGE, "convolution"), (HUGE_IMAGE, "column")]
)
def test_masks_are_never_held_in_integers(layout: Layout, pattern: Pattern) -> None:
    """S = 4,224 and 16,512 positions: a dense mask takes its own byte a pair, a block mask none of them."""
    tables, pairs = tables_of(layout), layout.length**2
    with PeakMemory() as block:
        tables.block_mask(pattern)
    assert block.peak < 128 * layout.length * 32
    with PeakMemory() as dense:
        mask = tables.allowed(pattern)
    assert mask.nbytes == pairs
    assert dense.peak < 2 * pairs + 2**26
