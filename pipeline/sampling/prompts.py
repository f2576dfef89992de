"""The captions of the generate stage: the prompts that people look at, and a sample of the train split."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from pipeline.config.generate import GenerateConfig
from pipeline.core.errors import UserError
from pipeline.core.seeds import hash64
from pipeline.data.catalog import Catalog
from pipeline.data.catalog_columns import plain_caption
from pipeline.data.order import permute

_SHUFFLED_ROWS = 1 << 24  # up to so many, an order of all of them is drawn; beyond, it is computed
_COMPARED = 100_000  # captions that a prompt is compared with, to name the nearest


def check_against_training(config: GenerateConfig, captions: Catalog | Iterable[str]) -> None:
    """Check that training prompts are captions of the train split and new ones are not (case and spaces aside).

    Raises:
        UserError: names the first prompt that is in the wrong list, and the nearest caption (of a sample, of many).
    """
    known = captions if isinstance(captions, Catalog) else _Listed(captions)
    for prompt in config.training_prompts:
        if not known.has_caption(prompt):
            some = {plain_caption(caption) for caption in known.caption_sample(_COMPARED, seed=0)}
            near = difflib.get_close_matches(plain_caption(prompt), sorted(some), n=1, cutoff=0)
            hint = f"the nearest is '{near[0]}'" if near else "it is empty"
            raise UserError(
                f"generate.training_prompts: expected captions of the train split, found '{prompt}', which is none;"
                f" {hint}: write that, or move the prompt to new_prompts"
            )
    for prompt in config.new_prompts:
        if known.has_caption(prompt):
            raise UserError(
                f"generate.new_prompts: expected prompts that training never saw, found '{prompt}',"
                " a caption of the train split: move it to training_prompts, or change it"
            )


def sampled_rows(rows: int, count: int, seed: int) -> list[int]:
    """The first `count` of `rows` in an order that `seed` fixes. Raises UserError when there are fewer."""
    if count > rows:
        raise UserError(
            f"generate.samples: expected at most the {rows} captions of the train split, found {count}; lower it"
        )
    if rows > _SHUFFLED_ROWS:
        computed: list[int] = permute(np.arange(count), rows, hash64("generate", seed)).tolist()
        return computed
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return order


class _Listed:
    """Captions in memory, which are asked as a `Catalog` is."""

    def __init__(self, captions: Iterable[str]) -> None:
        self._plain = {plain_caption(caption) for caption in captions}

    def has_caption(self, caption: str) -> bool:
        return plain_caption(caption) in self._plain

    def caption_sample(self, count: int, seed: int) -> Iterator[str]:
        return islice(sorted(self._plain), count)
