"""A batch of rows that come and go: each code, those that are there advance by one, wherever they stand.

    batch = RowBatch(model, slots=16)
    rows = batch.join(text_T, uniforms_BN, SamplingConfig(guidance=3))       # B candidates of one prompt
    finished = batch.step()                                                 # every row's next code
    batch.leave(rows)                                                       # whose client is gone

A row's codes are those that `draw_codes` draws: the same prompt reading, guidance, filters and draw, of the same random
numbers. Its bits do not depend on who else is there (`row_step.py` says why), so neither do its codes, in any
precision; those of `draw_codes` may differ from them as those of two batch sizes do.

Shapes: T text positions, B candidates, N codes of all levels, R rows of the cache: one for each row here, two for a
guided one, whose unprompted half follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.sampling.draw_next import UNKNOWN, given_at_start, guidance_scales
from pipeline.sampling.logits import draw, guide
from pipeline.sampling.prompt_cache import read_prompts
from pipeline.sampling.row_step import RowStep
from pipeline.transformer.attention import LayerCache
from pipeline.transformer.model import Transformer


@dataclass(eq=False)
class Row:
    """One candidate while it is drawn.

    Attributes:
        codes: int64 [N] on the CPU, each level's own ids; UNKNOWN (-1) where none is there yet.
        index: so many codes are drawn.
    """

    codes: Tensor
    index: int
    sampling: SamplingConfig

    @property
    def finished(self) -> bool:
        return self.index == len(self.codes)

    @property
    def slots(self) -> int:
        """Rows of the cache that it takes."""
        return slots_of(self.sampling)


@dataclass(eq=False)
class RasterRow(Row):
    """One that is drawn code by code: the first `index` of them are there, and those of an image prompt."""

    written: NDArray[np.int64]  # the memory of `codes`, where reading or writing one takes no microseconds
    known: list[int] | None  # UNKNOWN where a code is drawn
    uniforms: list[float]  # N
    scales: list[float] | None  # of guidance, for each of the N codes
    settings: str  # of `sampling`, to compare


def slots_of(sampling: SamplingConfig) -> int:
    """Rows of the cache that a candidate takes: 2 with guidance."""
    return 1 if sampling.guidance == 1.0 else 2


class RowBatch:
    """Up to `slots` rows of the cache of one model. For one thread."""

    def __init__(self, model: Transformer, slots: int) -> None:
        if model.order != "raster":
            raise UserError(
                f"expected a transformer of order raster, whose images advance code by code, found {model.order}:"
                f" {'take a PassBatch' if model.order == 'any' else 'smalti generate draws its images'}"
            )
        self._model, self._slots = model, slots
        self._levels = [model.layout.level_at(index) for index in range(model.layout.image_length)]
        self._cache = model.new_cache(slots)
        self._hidden = model.head.weight.new_empty(0, model.shape.width)  # [R, D]
        self._of_all = RowStep(model, self._cache)
        self._step: RowStep | None = None
        self.rows: list[RasterRow] = []

    @property
    def free(self) -> int:
        """Rows of the cache that are."""
        return self._slots - sum(row.slots for row in self.rows)

    @torch.inference_mode()
    def join(
        self, text_T: Tensor, uniforms_BN: Tensor, sampling: SamplingConfig, known_N: Tensor | None = None
    ) -> Sequence[Row]:
        """Read the prompt, and put its candidates at the end of the batch: their cache rows must be free.

        Candidates of which every code is known are finished at once, and not in the batch.
        """
        model, device = self._model, self._model.head.weight.device
        known_1N = None if known_N is None else known_N[None].to(device)
        given = 0 if known_1N is None else given_at_start(known_1N)
        scales, known = guidance_scales(sampling, model.layout), None if known_N is None else known_N.tolist()
        start = torch.full((model.layout.image_length,), UNKNOWN) if known_N is None else known_N.cpu()
        settings = sampling.model_dump_json()
        starts = [start.clone() for _ in uniforms_BN]
        rows = [
            RasterRow(codes, given, sampling, codes.numpy(), known, uniforms, scales, settings)
            for codes, uniforms in zip(starts, uniforms_BN.tolist(), strict=True)
        ]
        if given == model.layout.image_length:
            return rows
        used, guided = self._slots - self.free, scales is not None
        given_1n = text_T.new_empty((1, 0), device=device) if known_1N is None else known_1N[:, :given]
        one = torch.zeros(1, dtype=torch.int64, device=device)
        length = model.layout.text_length + 1 + given
        hidden, read = read_prompts(model, text_T[None].to(device), one, given_1n, guided, length)
        for own, prompt in zip(self._cache, read, strict=True):
            count = len(rows) * len(hidden)
            own.keys[used : used + count, :, :length] = prompt.keys.repeat(len(rows), 1, 1, 1)
            own.values[used : used + count, :, :length] = prompt.values.repeat(len(rows), 1, 1, 1)
        self._hidden = torch.cat([self._hidden, hidden.repeat(len(rows), 1)])
        self.rows, self._step = [*self.rows, *rows], None
        return rows

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out, finished or not; those behind them move up."""
        stay = [row for row in self.rows if row not in rows]
        if len(stay) == len(self.rows):
            return
        kept = [slot for slot, row in enumerate(self._owners()) if row not in rows]
        for own in self._cache if kept and kept[-1] != len(kept) - 1 else ():
            own.keys[: len(kept)] = own.keys[kept]
            own.values[: len(kept)] = own.values[kept]
        self._hidden, self._step = self._hidden[kept], None
        self.rows = stay

    @torch.inference_mode()
    def step(self) -> Sequence[Row]:
        """Draw the next code of every row; those that are finished now have left."""
        first = list(accumulate((row.slots for row in self.rows), initial=0))[:-1]
        of_kind: dict[tuple[int, str], list[int]] = {}
        for place, row in enumerate(self.rows):
            of_kind.setdefault((self._levels[row.index], row.settings), []).append(place)
        for places in of_kind.values():
            self._draw([self.rows[place] for place in places], [first[place] for place in places])
        finished = [row for row in self.rows if row.finished]
        if finished:
            self.leave(finished)
        if self.rows:
            self._read()
        return finished

    def _draw(self, rows: Sequence[RasterRow], slots: Sequence[int]) -> None:
        """The next code of rows of one kind, whose first rows of the cache are `slots`."""
        level = self._levels[rows[0].index]
        guided = rows[0].scales is not None
        both = [*slots, *(slot + 1 for slot in slots)] if guided else slots
        logits = self._stepping().logits(self._hidden, both, level)
        if guided:
            prompted, unprompted = logits.chunk(2)
            scales = [row.scales[row.index] for row in rows if row.scales is not None]
            logits = guide(prompted, unprompted, logits.new_tensor(scales)[:, None])
        uniforms = torch.tensor([row.uniforms[row.index] for row in rows], dtype=torch.float64, device=logits.device)
        for row, code in zip(rows, draw(logits, uniforms, rows[0].sampling).tolist(), strict=True):
            known = UNKNOWN if row.known is None else row.known[row.index]
            row.written[row.index] = code if known == UNKNOWN else known
            row.index += 1

    def _read(self) -> None:
        """Put each row's newest code into the cache."""
        last = [(int(row.written[row.index - 1]), row.index - 1) for row in self._owners()]
        self._hidden = self._stepping().read([code for code, _ in last], [index for _, index in last])

    def _stepping(self) -> RowStep:
        """The step of the rows that are there."""
        if self._step is None:
            used = self._slots - self.free
            self._step = self._of_all.of_rows([LayerCache(own.keys[:used], own.values[:used]) for own in self._cache])
        return self._step

    def _owners(self) -> list[RasterRow]:
        """Whose each row of the cache is."""
        return [row for row in self.rows for _ in range(row.slots)]
