"""Raster decoding in fewer passes, with the codes of one-by-one drawing: Jacobi iteration with coupled draws.

A pass reads a window of codes, of which only the first is sure and the others are guessed, and draws the next of each
with its own fixed random number. The first draw is right; each further one is, as long as the code before it had been
guessed. What was drawn wrong is the guess of the next pass, which overwrites what the cache holds of it. Teng et al.
2025 (speculative Jacobi decoding) accept with a probability; with a candidate's random numbers fixed beforehand,
equality decides, and the codes are those of one-by-one drawing.

It pays where a pass of a few codes costs hardly more than one of one code: at one image at a time.

Shapes: R rows (1, or with guidance 2: the unprompted one follows), n codes of a window, N codes of all levels, D width,
V codes of the level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from pipeline.sampling.cached_step import (
    Layer,
    Workspace,
    code_positions,
    level_weights,
    norm_of,
    rotary_table,
    run_layers,
)
from pipeline.sampling.draw_next import UNKNOWN, Drawing
from pipeline.sampling.logits import draw, guide
from pipeline.transformer.attention import attend
from pipeline.transformer.model import Cache, Transformer
from pipeline.transformer.rotary import RotaryTable


class WindowStep(Protocol):
    """A transformer and a cache that holds what has been read of R sequences. `index` counts the N codes from 0."""

    def logits(self, hidden_RnD: Tensor, level: int) -> Tensor:
        """Over the level's codes: float32 [R, n, V]."""

    def read(self, codes_n: Tensor, index: int) -> Tensor:
        """Put codes `index` .. `index + n - 1` into each row's cache; the hidden states [R, n, D] that predict the code
        after each."""


class ModelWindowStep:
    """The reference, on any device."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self._model, self._cache, self._rows = model, cache, len(cache[0].keys)

    def logits(self, hidden_RnD: Tensor, level: int) -> Tensor:
        return self._model.level_logits(hidden_RnD, level).float()

    def read(self, codes_n: Tensor, index: int) -> Tensor:
        return self._model.read_window(codes_n.expand(self._rows, -1), index, self._cache)


class CachedWindowStep:
    """For CPUs: the products and norms of `cached_step.py`, with a column for each code of the window."""

    def __init__(self, model: Transformer, cache: Cache) -> None:
        self._model, self._rows = model, len(cache[0].keys)
        self._first, self._offsets = model.layout.text_length + 1, model.tables.code_offsets
        self._code_positions, self._rotary = code_positions(model), rotary_table(model, cache[0].keys.dtype)
        self._layers = [Layer.build(model, block, own) for block, own in zip(model.blocks, cache, strict=True)]
        self._norm, self._heads = norm_of(model.norm), level_weights(model)[1]
        self._workspaces: dict[int, Workspace] = {}  # by n: windows at a level's end are shorter

    def logits(self, hidden_RnD: Tensor, level: int) -> Tensor:
        head = self._heads[level]
        return torch.mm(head, hidden_RnD.flatten(0, 1).t()).t().float().contiguous().unflatten(0, hidden_RnD.shape[:2])

    def read(self, codes_n: Tensor, index: int) -> Tensor:
        n, rows = len(codes_n), self._rows * len(codes_n)
        workspace = self._workspaces.get(n)
        if workspace is None:
            workspace = self._workspaces[n] = Workspace(self._layers[0], rows)
        x_nD = self._model.embedding(codes_n + self._offsets[index : index + n])
        if self._code_positions is not None:
            x_nD = x_nD + self._code_positions[index : index + n]
        x_CD = x_nD.repeat(self._rows if rows > 1 else 2, 1)  # one row fills up two columns
        position = self._first + index
        rotate = None
        if self._rotary is not None:
            turned = [
                x[position : position + n].repeat(self._rows, 1)[:, None]
                for x in (self._rotary.cosine, self._rotary.sine)
            ]
            rotate = partial(RotaryTable(turned[0][None], turned[1][None]).apply_, position=0)
        run_layers(self._layers, x_CD, workspace, rotate, partial(self._attend, position, n))
        self._norm(x_CD, workspace.normed_CD)
        return workspace.normed_CD[:rows].unflatten(0, (self._rows, n))

    def _attend(self, position: int, n: int, layer: Layer, workspace: Workspace) -> None:
        """Attention of the window over what its pattern shows of the cache and of itself, into `mixed_BD`."""
        own, cache, end = layer.attention, layer.cache, position + n
        each = (self._rows, n)
        cache.keys[:, :, position:end] = workspace.key.unflatten(0, each).transpose(1, 2)
        cache.values[:, :, position:end] = workspace.value.unflatten(0, each).transpose(1, 2)
        query = workspace.query.flatten(1, 2).unflatten(0, each).transpose(1, 2)  # [R, H, n, K]
        keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
        mixed = attend(query, keys, values, own.scale, own.pattern, self._model.tables)
        workspace.mixed_BD.copy_(mixed.transpose(1, 2).flatten(2).flatten(0, 1))


def draw_speculating(
    model: Transformer,
    cache: Cache,
    hidden_RD: Tensor,
    drawing: Drawing,
    given: int,
    window: int,
    on_code: Callable[[int, Tensor], object] | None = None,
) -> int:
    """Draw the codes from `given` on into `drawing.codes` [1, N]; the number of passes it took.

    Args:
        cache: holds the prompt and the given codes.
        hidden_RD: predicts code `given`.
        window: codes of a pass, at most.
    """
    step = (CachedWindowStep if hidden_RD.device.type == "cpu" else ModelWindowStep)(model, cache)
    layout, codes_N = model.layout, drawing.codes[0]
    count, sure, passes = layout.image_length, given, 0
    drawn_n = _draw(step, hidden_RD[:, None], model, drawing, given)
    codes_N[given : given + 1] = drawn_n
    sure += 1
    guessed = sure  # codes before it are drawn or guessed
    while True:
        if on_code is not None:
            on_code(sure, drawing.codes)
        if sure == count:
            return passes
        level = layout.level_at(sure)
        end = min(sure + window, layout.level_starts[level] + layout.levels[level].positions)
        if guessed < end:
            codes_N[guessed:end] = _guesses(drawing, model, guessed, end, sure)
        before_n = codes_N[sure : end - 1].clone()
        drawn_n = _draw(step, step.read(codes_N[sure - 1 : end - 1], sure - 1), model, drawing, sure)
        codes_N[sure:end] = drawn_n
        same = int((drawn_n[:-1] == before_n).cumprod(0).sum())
        sure, guessed, passes = sure + 1 + same, end, passes + 1


def _draw(step: WindowStep, hidden_RnD: Tensor, model: Transformer, drawing: Drawing, index: int) -> Tensor:
    """The codes from `index` on that the hidden states predict, each with its own number; known ones as they are."""
    end = index + hidden_RnD.shape[1]
    logits = step.logits(hidden_RnD, model.layout.level_at(index))
    logits_nV = logits[0]
    if drawing.scales is not None:
        scaled = zip(*logits, drawing.scales[index:end], strict=True)
        logits_nV = torch.stack([guide(prompted, unprompted, scale) for prompted, unprompted, scale in scaled])
    drawn_n = draw(logits_nV, drawing.uniforms[0, index:end], drawing.sampling)
    if drawing.known is None:
        return drawn_n
    known_n = drawing.known[0, index:end]
    return torch.where(known_n == UNKNOWN, drawn_n, known_n)


def _guesses(drawing: Drawing, model: Transformer, start: int, end: int, sure: int) -> Tensor:
    """A first guess at codes of one level: what is above each, in the first row the last sure code; known ones.

    `sure` is how many codes are. Where there is nothing to guess from, what is there stays.
    """
    codes_N, layout = drawing.codes[0], model.layout
    level = layout.level_at(start)
    first, width = layout.level_starts[level], layout.levels[level].width
    last = sure - 1 if sure > first else None
    source = [i - width if i - width >= first else i if last is None else last for i in range(start, end)]
    guessed_n = codes_N[torch.tensor(source, device=codes_N.device)]
    if drawing.known is None:
        return guessed_n
    known_n = drawing.known[0, start:end]
    return torch.where(known_n == UNKNOWN, guessed_n, known_n)
