"""Promises of pipeline/sampling/row_products.py and row_step.py: a row has its bits, however many there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling import row_products, row_step
from pipeline.sampling.decode import candidate_uniforms
from pipeline.sampling.row_batch import Joining, RowBatch
from pipeline.sampling.row_products import RowProduct
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from tests.transformer.test_model import batch, built

LAYOUT = Layout.of(5, 40, [(4, 4, 64)])
ROWS = (1, 2, 3, 5, 8, 13)


def drawn(model: Transformer, others: int) -> Tensor:
    """The codes of one row among `others`, of which every second is a code behind."""
    rows, (text, _) = RowBatch(model, slots=16), batch(LAYOUT)
    joining = [
        Joining(text[number % 3], candidate_uniforms(number, 0, 0, LAYOUT.image_length)[None], SamplingConfig())
        for number in range(others + 1)
    ]
    (own,), *_ = rows.join(joining[::2])
    rows.step()
    rows.join(joining[1::2])
    while rows.rows:
        rows.step()
    return own.codes


@pytest.mark.parametrize("packs", [True, False])
def test_where_products_do_not_round_alike_rows_go_through_one_by_one(
    packs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(LAYOUT, width=64)
    expected = drawn(model, 0)
    monkeypatch.setattr(row_products, "can_pack", lambda _weight: packs)
    monkeypatch.setattr(row_products, "_any_number_rounds_alike", lambda *_: False)
    seen = set[int]()
    product = RowProduct.__call__

    def look(self: RowProduct, x_MD: Tensor) -> Tensor:
        seen.add(len(x_MD))
        return product(self, x_MD)

    monkeypatch.setattr(RowProduct, "__call__", look)
    found = [drawn(model, others) for others in (0, 1, 4)]
    assert all(torch.equal(codes, expected) for codes in found)
    assert seen == {1, LAYOUT.text_length + 1}  # a code each, and prompts


@pytest.mark.machine
def test_one_row_that_would_round_in_another_way_is_taken_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x_MD = torch.randn(48, 32), torch.randn(5, 32)
    monkeypatch.setattr(row_products, "_one_row_rounds_alike", lambda *_: False)
    multiply, taken = row_products.multiply, list[int]()

    def listen(x: Tensor, packed: Tensor) -> Tensor:
        taken.append(len(x))
        return multiply(x, packed)

    own = RowProduct(weight)
    if not own.rounds_alike:
        pytest.skip("this machine packs no weights")
    whole = own(x_MD)
    monkeypatch.setattr(row_products, "multiply", listen)
    assert torch.equal(own(x_MD[2:3])[0], whole[2])
    assert taken == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_a_row_are_the_same_among_any_number_in_both_precisions(dtype: torch.dtype) -> None:
    model = built(LAYOUT, width=64).to(dtype)
    expected = drawn(model, 0)
    assert all(torch.equal(drawn(model, others), expected) for others in (1, 2, 5, 10))


@pytest.mark.parametrize("activated", [row_step._swiglu, row_step._gelu])
@pytest.mark.parametrize("width", [86, 171, 683])
def test_bits_of_an_activation_do_not_depend_on_the_rows_beside(activated: row_step.Norm, width: int) -> None:
    x_ME = 4 * torch.randn(120, 2 * width, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([activated(row) for row in x_ME.split(1)])
    for rows in (*ROWS, 120):
        assert torch.equal(activated(x_ME[:rows].clone()), alone[:rows]), rows
