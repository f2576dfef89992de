"""Requests of a model of order any or scale that come and go: in turn, each advances by a pass.

    batch = PassBatch(model, slots=16)
    (rows,) = batch.join([Joining(text_T, uniforms_BN, SamplingConfig(passes=32))])  # B candidates of one prompt
    finished = batch.step()                                                 # a pass of every request
    batch.leave(rows)                                                       # whose client is gone

The candidates of a request share its passes, and have a cache of their own, so their bits are those of `draw_codes` for
that request alone, whoever else is there. Products are not shared among requests: a pass takes many codes at once.

Shapes: T text positions, B candidates, N codes of all levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sampling.pass_decode import PassTransformer, begin
from pipeline.sampling.row_batch import Joining, Row


@dataclass(eq=False)
class _Request:
    """Candidates of one prompt."""

    codes: Tensor  # [B, N], on the model's device
    passes: Iterator[int]
    rows: list[Row]

    def advance(self) -> None:
        """By a pass."""
        there = next(self.passes)
        for row, codes in zip(self.rows, self.codes.cpu(), strict=True):
            row.codes, row.index = codes, there


class PassBatch:
    """As `RowBatch`, for a transformer of order any or scale. For one thread."""

    def __init__(self, model: PassTransformer, slots: int) -> None:
        self._model, self._slots = model, slots
        self._requests: list[_Request] = []

    @property
    def rows(self) -> list[Row]:
        """All that are drawn."""
        return [row for request in self._requests for row in request.rows]

    @property
    def free(self) -> int:
        """Rows of caches that may still be made."""
        return self._slots - sum(row.slots for row in self.rows)

    @torch.inference_mode()
    def join(self, joining: Sequence[Joining]) -> list[Sequence[Row]]:
        """Begin requests, with `numbers_per_image` uniforms a candidate; all codes known: finished at once."""
        return [self._begin(one) for one in joining]

    def _begin(self, one: Joining) -> Sequence[Row]:
        device, known_N = self._model.head.weight.device, one.known
        text_1T, one_B = (
            one.text[None].to(device),
            torch.zeros(len(one.uniforms), dtype=torch.int64, device=device),
        )
        known_1N = None if known_N is None else known_N[None].to(device)
        codes_BN, passes = begin(self._model, text_1T, one_B, one.uniforms.to(device), one.sampling, known_1N)
        request = _Request(codes_BN, passes, [Row(codes, 0, one.sampling) for codes in codes_BN.cpu()])
        if known_N is not None and bool((known_N >= 0).all()):
            request.advance()
        else:
            self._requests.append(request)
        return request.rows

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Take requests out, finished or not; all rows of one leave together."""
        self._requests = [request for request in self._requests if request.rows[0] not in rows]

    @torch.inference_mode()
    def step(self) -> Sequence[Row]:
        """A pass of every request; those that are finished now have left."""
        for request in self._requests:
            request.advance()
        finished = [row for row in self.rows if row.finished]
        self.leave(finished)
        return finished
