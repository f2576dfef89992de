"""The promise of pipeline/sampling/row_batch.py: rows that come and go draw what they draw alone."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.row_batch import Joining, Row, RowBatch
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from tests.transformer.test_model import LAYOUTS, SHAPES, batch, built

SETTINGS = [
    SamplingConfig(),
    SamplingConfig(guidance=2.0, guidance_schedule="linear", top_k=3, temperature=0.9),
    SamplingConfig(guidance=3.0, top_p=0.9, guidance_interval=(0.2, 0.8)),
    SamplingConfig(temperature=0),
    SamplingConfig(min_p=0.1),
]


def joined(rows: RowBatch, model: Transformer, number: int, candidates: int = 1, known: bool = False) -> list[Row]:
    text, codes = batch(model.layout)
    known_N = codes[number % 3].where(torch.arange(codes.shape[1]) % 3 != 2, UNKNOWN) if known else None
    uniforms = torch.stack([candidate_uniforms(number, 0, j, model.layout.image_length) for j in range(candidates)])
    (own,) = rows.join([Joining(text[number % 3], uniforms, SETTINGS[number % len(SETTINGS)], known_N)])
    return list(own)


def alone(model: Transformer, number: int, known: bool = False) -> torch.Tensor:
    rows = RowBatch(model, slots=2)
    (row,) = joined(rows, model, number, known=known)
    while rows.rows:
        rows.step()
    return row.codes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_draws_the_codes_of_the_decode_loop(layout: Layout, shape: dict[str, object]) -> None:
    model = built(layout, **shape)
    text, codes = batch(layout)
    for number, sampling in enumerate(SETTINGS):
        for known in (False, True):
            known_N = codes[number % 3].where(torch.arange(codes.shape[1]) % 3 != 2, UNKNOWN)
            uniforms = candidate_uniforms(number, 0, 0, layout.image_length)[None]
            own = text[number % 3][None], torch.tensor([0]), uniforms, sampling, known_N[None] if known else None
            assert torch.equal(draw_codes(model, *own)[0], alone(model, number, known)), (number, known)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_do_not_depend_on_who_comes_and_goes(layout: Layout, shape: dict[str, object]) -> None:
    model = built(layout, **shape)
    rows, drawn = RowBatch(model, slots=24), {}
    for number in range(12):
        if number == 7:
            rows.leave([drawn[6]])  # in the middle of its codes
        if rows.free >= 4:
            drawn[number], *_ = joined(rows, model, number, candidates=1 + number % 2, known=number % 4 == 3)
        for _ in range(number % 5):
            rows.step()
    assert len({row.index for row in rows.rows}) > 1  # at different codes
    while rows.rows:
        rows.step()
    del drawn[6]
    assert len(drawn) > 7
    for number, row in drawn.items():
        assert torch.equal(row.codes, alone(model, number, known=number % 4 == 3)), number


def test_bits_of_a_row_do_not_depend_on_how_many_there_are() -> None:
    model = built(Layout.of(5, 40, [(6, 6, 64)]), width=128, layers=2)
    hidden = {}
    for others in (0, 1, 2, 3, 6, 11):
        rows = RowBatch(model, slots=16)
        for number in range(others):  # one code further on, all of them, and the last two yet another
            joined(rows, model, 0, candidates=1)
            if number in (others - 2, others - 1):
                rows.step()
        joined(rows, model, 5)
        for _ in range(9):
            rows.step()
        hidden[others] = rows._hidden[-1].clone()
    for others, found in hidden.items():
        assert torch.equal(found, hidden[0]), others
