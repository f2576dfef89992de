"""The captions of the generate stage: the prompts that people look at, and a sample of the train split."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch

from pipeline.config.generate import GenerateConfig
from pipeline.core.errors import UserError
from pipeline.core.text import clean_text


def check_against_training(config: GenerateConfig, captions: Iterable[str]) -> None:
    """Check that training prompts are captions of the train split and new ones are not (case and spaces aside).

    Raises:
        UserError: names the first prompt that is in the wrong list, and the nearest caption.
    """
    known = {_plain(caption) for caption in captions}
    for prompt in config.training_prompts:
        if _plain(prompt) not in known:
            near = difflib.get_close_matches(_plain(prompt), sorted(known), n=1, cutoff=0)
            hint = f"the nearest is '{near[0]}'" if near else "it is empty"
            raise UserError(
                f"generate.training_prompts: expected captions of the train split, found '{prompt}', which is none;"
                f" {hint}: write that, or move the prompt to new_prompts"
            )
    for prompt in config.new_prompts:
        if _plain(prompt) in known:
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
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:count]


def _plain(caption: str) -> str:
    return clean_text(caption).lower()
