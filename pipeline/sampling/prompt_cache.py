"""Prompts into a cache, once each, and from there to their candidates.

Shapes: P prompts, B candidates (rows), T text positions, N codes of all levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.text_tokenizer.bpe import PAD_ID
from pipeline.transformer.model import Cache, Transformer


def read_prompts(
    model: Transformer, text_PT: Tensor, prompt_of_B: Tensor, given_Pn: Tensor, guided: bool, length: int
) -> tuple[Tensor, Cache]:
    """Prompts and first codes into a cache of `length` positions with a row per candidate, and the hidden state that
    predicts the next code.

    With guidance the unprompted rows follow the prompted ones.
    """
    rows = prompt_of_B
    if guided:
        # Prompts that share all their known codes (none) share one unprompted row.
        first, inverse = given_Pn.unique(dim=0, return_inverse=True) if given_Pn.shape[1] else (given_Pn[:1], None)
        own = torch.zeros_like(prompt_of_B) if inverse is None else inverse[prompt_of_B]
        rows = torch.cat([prompt_of_B, len(text_PT) + own])
        text_PT = torch.cat([text_PT, text_PT.new_full((len(first), text_PT.shape[1]), PAD_ID)])
        given_Pn = torch.cat([given_Pn, first])
    read = model.layout.text_length + 1 + given_Pn.shape[1]
    prompt_cache = model.new_cache(len(text_PT), read)
    hidden = model.read_text(text_PT, prompt_cache)
    if given_Pn.shape[1]:
        hidden = model.read_codes(given_Pn, 0, prompt_cache)
    cache = model.new_cache(len(rows), length)
    for own_layer, prompt in zip(cache, prompt_cache, strict=True):
        own_layer.keys[:, :, :read] = prompt.keys[rows]
        own_layer.values[:, :, :read] = prompt.values[rows]
    return hidden[rows], cache
