"""One turn of the decode loop: the next code of every candidate from its logits, into the codes and into the cache.

Twice the same: with the code's index as a number, for steps that take it so, and as a tensor on the device, for
`StaticStep`, so that CUDA can replay the turn as a graph. Neither waits for the device.

Shapes: B candidates, R rows (B, or with guidance 2 B: the unprompted ones follow), N codes, V codes of the level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.cuda_graph import Replayed
from pipeline.sampling.decode_step import DecodeStep
from pipeline.sampling.logits import draw, guided
from pipeline.sampling.static_step import StaticStep
from pipeline.transformer.layout import Layout

UNKNOWN = -1  # in `known`: a code that is to be drawn
DrawNext = Callable[[int], None]  # with the index of the code; called with one after the other


@dataclass(frozen=True)
class Drawing:
    """What the loop draws, and what it needs for that beside a step."""

    codes: Tensor  # [B, N], written code by code
    uniforms: Tensor  # [B, N]
    known: Tensor | None  # [B, N], UNKNOWN where a code is drawn
    sampling: SamplingConfig
    scales: list[float] | None  # of guidance, for each of the N codes; None: no guidance


def guidance_scales(sampling: SamplingConfig, layout: Layout) -> list[float] | None:
    """The scale of guidance at each code, by how much of its own level is drawn; None without guidance."""
    if sampling.guidance == 1.0:
        return None
    sizes = [level.positions for level in layout.levels]
    return [sampling.guidance_at(index / max(size - 1, 1)) for size in sizes for index in range(size)]


def given_at_start(known_PN: Tensor) -> int:
    """How many codes from the first on every prompt has."""
    holes = (known_PN == UNKNOWN).any(0).nonzero()
    return int(holes[0]) if len(holes) else known_PN.shape[1]


class DrawWithNumbers:
    """With indices as numbers."""

    def __init__(self, step: DecodeStep, hidden_RD: Tensor, drawing: Drawing) -> None:
        """`hidden_RD` predicts the first code that is drawn."""
        self._step, self._hidden, self._drawing = step, hidden_RD, drawing
        known = drawing.known
        self._forced = None if known is None else (known != UNKNOWN).any(0).tolist()

    def __call__(self, index: int) -> None:
        own = self._drawing
        logits = guided(self._step.logits(self._hidden, index), None if own.scales is None else own.scales[index])
        code_B = draw(logits, own.uniforms[:, index], own.sampling)
        if self._forced is not None and self._forced[index] and own.known is not None:
            known_B = own.known[:, index]
            code_B = torch.where(known_B == UNKNOWN, code_B, known_B)
        own.codes[:, index] = code_B
        if index + 1 < own.codes.shape[1]:
            self._hidden = self._step.read(code_B if own.scales is None else code_B.repeat(2), index)


class DrawWithTensors:
    """With the index in `StaticStep.index`; on CUDA a graph for each level and stretch of positions."""

    def __init__(self, step: StaticStep, hidden_RD: Tensor, drawing: Drawing) -> None:
        """`hidden_RD` predicts the first code that is drawn."""
        self._step, self._hidden, self._drawing = step, hidden_RD.clone(), drawing
        device = hidden_RD.device
        self._replayed = Replayed(device)
        self._scales = None if drawing.scales is None else torch.tensor(drawing.scales, device=device)

    def __call__(self, index: int) -> None:
        if index + 1 == self._drawing.codes.shape[1]:  # the last code is never read
            self._draw(index)
            return
        graph = (self._step.level(index), self._step.end(index))
        self._replayed(graph, partial(self._draw_and_read, index))

    def _draw_and_read(self, index: int) -> None:
        """`index` chooses the level and how far attention looks; the code's own is in `StaticStep.index`."""
        code_B = self._draw(index)
        self._hidden.copy_(self._step.read(code_B if self._scales is None else code_B.repeat(2), index))

    def _draw(self, index: int) -> Tensor:
        own, here = self._drawing, self._step.index
        scale = None if self._scales is None else self._scales.index_select(0, here)
        logits = guided(self._step.logits(self._hidden, index), scale)
        code_B1 = draw(logits, own.uniforms.index_select(1, here)[:, 0], own.sampling)[:, None]
        if own.known is not None:
            known_B1 = own.known.index_select(1, here)
            code_B1 = torch.where(known_B1 == UNKNOWN, code_B1, known_B1)
        own.codes.index_copy_(1, here, code_B1)
        return code_B1[:, 0]
