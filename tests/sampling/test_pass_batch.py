"""The promise of pipeline/sampling/pass_batch.py: requests that come and go draw what they draw alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.pass_batch import PassBatch
from pipeline.sampling.pass_decode import PassTransformer, draws_in_passes
from pipeline.sampling.row_batch import Joining, Row
from tests.sampling.test_parallel_decode import LAYOUT, TEXT, built

SETTINGS = {
    "any": [
        SamplingConfig(),
        SamplingConfig(passes=5, guidance=2.0),
        SamplingConfig(passes=7, pass_order="confidence", schedule="linear", top_k=5),
    ],
    "scale": [SamplingConfig(), SamplingConfig(guidance=2.0), SamplingConfig(temperature_end=0.5, top_k=5)],
}
HALF = torch.arange(LAYOUT.image_length).where(torch.arange(LAYOUT.image_length) % 2 == 0, UNKNOWN).clamp(max=7)


def asked(number: int, model: PassTransformer) -> tuple[torch.Tensor, torch.Tensor, SamplingConfig]:
    count = numbers_per_image(model)
    uniforms = torch.stack([candidate_uniforms(number, 0, j, count) for j in range(1 + number % 2)])
    return TEXT[number % 3], uniforms, SETTINGS[model.order][number % 3]


def alone(number: int, model: PassTransformer, known: torch.Tensor | None) -> torch.Tensor:
    text, uniforms, sampling = asked(number, model)
    own = None if known is None else known[None]
    return draw_codes(model, text[None], torch.zeros(len(uniforms), dtype=torch.int64), uniforms, sampling, own)


@pytest.mark.parametrize("order", ["any", "scale"])
def test_requests_that_come_and_go_draw_what_they_draw_alone(order: str) -> None:
    model = built(order)
    assert draws_in_passes(model)
    batch, drawn, known = PassBatch(model, slots=24), dict[int, Sequence[Row]](), dict[int, torch.Tensor | None]()
    for number in range(6):
        known[number] = HALF if number >= 4 else None
        (drawn[number],) = batch.join([Joining(*asked(number, model), known[number])])
        for _ in range(number if order == "any" else number % 3 == 1):  # there are two levels
            batch.step()
        if number == 2:
            batch.leave(drawn.pop(2))
    assert len({row.index for row in batch.rows}) > 1
    while batch.rows:
        batch.step()
    assert batch.free == 24
    for number, rows in drawn.items():
        assert torch.equal(torch.stack([row.codes for row in rows]), alone(number, model, known[number])), number


@pytest.mark.parametrize("order", ["any", "scale"])
def test_codes_are_unknown_until_they_are_drawn_and_an_image_that_is_all_known_is_finished_at_once(order: str) -> None:
    model = built(order)
    assert draws_in_passes(model)
    batch = PassBatch(model, slots=4)
    text, uniforms, _ = asked(0, model)
    ((row,),) = batch.join([Joining(text, uniforms, SamplingConfig(passes=4), HALF)])
    shares = [int((row.codes != UNKNOWN).sum())]
    while not row.finished:
        batch.step()
        shares.append(int((row.codes != UNKNOWN).sum()))
    assert shares == sorted(set(shares))
    assert shares[-1] == LAYOUT.image_length
    ((known,),) = batch.join([Joining(text, uniforms, SamplingConfig(), row.codes.clone())])
    assert known.finished
    assert not batch.rows
    assert torch.equal(known.codes, row.codes)
