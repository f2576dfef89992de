"""A batch of rows that come and go: each code, those that are there advance by one, wherever they stand.

    batch = RowBatch(model, slots=16)
    ((row, *_),) = batch.join([Joining(text_T, uniforms_BN, SamplingConfig(guidance=3))])  # B candidates of one prompt
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
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.sampling.draw_next import UNKNOWN, given_at_start, guidance_scales
from pipeline.sampling.logits import draw, guided
from pipeline.sampling.row_step import RowStep
from pipeline.text_tokenizer.bpe import PAD_ID
from pipeline.transformer.model import Transformer

_Sequence = tuple[tuple[int, ...], tuple[int, ...]]  # text, and codes that are given at the start


@dataclass(frozen=True)
class Joining:
    """Candidates of one prompt.

    Attributes:
        text: ids of the prompt, [T].
        uniforms: each candidate's own random numbers, `numbers_per_image` of them, [B, N].
        known: codes that they have from the start, [N], UNKNOWN (-1) where one is drawn; None: none.
    """

    text: Tensor
    uniforms: Tensor
    sampling: SamplingConfig
    known: Tensor | None = None


@dataclass(eq=False)
class Row:
    """One candidate while it is drawn.

    Attributes:
        codes: int64 [N] on the CPU, each level's own ids; UNKNOWN (-1) where none is there yet.
        index: so many codes are drawn.
        count: of all its codes.
        slots: rows of the cache that it takes.
    """

    codes: Tensor
    index: int
    sampling: SamplingConfig
    count: int = field(init=False)
    slots: int = field(init=False)

    def __post_init__(self) -> None:  # both are asked for at each code
        self.count, self.slots = len(self.codes), slots_of(self.sampling)

    @property
    def finished(self) -> bool:
        return self.index == self.count


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
                " take a PassBatch"
            )
        self._model, self._slots = model, slots
        self._levels = [model.layout.level_at(index) for index in range(model.layout.image_length)]
        self._step = RowStep(model, slots)
        self._hidden = model.head.weight.new_empty(0, self._step.width)  # what predicts the rows' next codes
        self.rows: list[RasterRow] = []

    @property
    def free(self) -> int:
        """Rows of the cache that are."""
        return self._slots - sum(row.slots for row in self.rows)

    @torch.inference_mode()
    def join(self, joining: Sequence[Joining]) -> list[Sequence[Row]]:
        """Read their prompts, and put their candidates at the end of the batch: their cache rows must be free.

        Candidates of which every code is known are finished at once, and not in the batch.
        """
        joined = [self._rows_of(one) for one in joining]
        sequences: dict[_Sequence, list[int]] = {}  # which rows of the cache begin with it
        slot = self._slots - self.free
        for one, rows in zip(joining, joined, strict=True):
            prompt = tuple(one.text.tolist())
            for row in rows:
                if row.finished:
                    continue
                given = tuple(row.written[: row.index].tolist())
                for text in [prompt, (PAD_ID,) * len(prompt)][: row.slots]:
                    sequences.setdefault((text, given), []).append(slot)
                    slot += 1
                self.rows.append(row)
        if sequences:
            self._hidden = torch.cat([self._hidden, self._read_prompts(sequences, slot)])
        return [list(rows) for rows in joined]

    def _rows_of(self, one: Joining) -> list[RasterRow]:
        """Its candidates, before their first code."""
        layout, known_N = self._model.layout, one.known
        given = 0 if known_N is None else given_at_start(known_N[None])
        start = torch.full((layout.image_length,), UNKNOWN) if known_N is None else known_N.cpu()
        scales, known = guidance_scales(one.sampling, layout), None if known_N is None else known_N.tolist()
        settings, starts = one.sampling.model_dump_json(), [start.clone() for _ in one.uniforms]
        return [
            RasterRow(codes, given, one.sampling, codes.numpy(), known, uniforms, scales, settings)
            for codes, uniforms in zip(starts, one.uniforms.tolist(), strict=True)
        ]

    def _read_prompts(self, sequences: dict[_Sequence, list[int]], used: int) -> Tensor:
        """Each into its rows of the cache, those of one length together; what predicts their next codes."""
        device, first = self._hidden.device, len(self._hidden)
        hidden = self._hidden.new_empty(used - first, self._hidden.shape[1])
        by_length: dict[int, list[_Sequence]] = {}
        for sequence in sequences:
            by_length.setdefault(len(sequence[1]), []).append(sequence)
        for alike in by_length.values():
            texts, given = (torch.tensor(part, dtype=torch.int64) for part in zip(*alike, strict=True))
            slots = [sequences[sequence] for sequence in alike]
            found = self._step.read_prompts(texts.to(device), given.to(device), slots)
            for own, rows in zip(found, slots, strict=True):
                hidden[[slot - first for slot in rows]] = own
        return hidden

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Take rows out, finished or not; those behind them move up."""
        stay = [row for row in self.rows if row not in rows]
        if len(stay) == len(self.rows):
            return
        kept = [slot for slot, row in enumerate(self._owners()) if row not in rows]
        self._step.keep(kept)
        self._hidden = self._hidden[kept]
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
        scales = [row.scales[row.index] for row in rows if row.scales is not None]
        both = [*slots, *(slot + 1 for slot in slots)] if scales else slots
        own = self._hidden if list(both) == list(range(self._hidden.shape[0])) else self._hidden[list(both)]
        logits = self._step.logits(own, level)
        logits = guided(logits, logits.new_tensor(scales)[:, None] if scales else None)
        uniforms = torch.tensor([row.uniforms[row.index] for row in rows], dtype=torch.float64, device=logits.device)
        for row, code in zip(rows, draw(logits, uniforms, rows[0].sampling).tolist(), strict=True):
            known = UNKNOWN if row.known is None else row.known[row.index]
            row.written[row.index] = code if known == UNKNOWN else known
            row.index += 1

    def _read(self) -> None:
        """Put each row's newest code into the cache."""
        last = [(int(row.written[row.index - 1]), row.index - 1) for row in self._owners()]
        self._hidden = self._step.read([code for code, _ in last], [index for _, index in last])

    def _owners(self) -> list[RasterRow]:
        """Whose each row of the cache is."""
        return [row for row in self.rows for _ in range(row.slots)]
