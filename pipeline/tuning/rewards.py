"""Rewards: a number for each image beside its prompt, the higher the better."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from pipeline.config.tune import TuneConfig
from pipeline.core import distributed
from pipeline.reranker import Ranker
from pipeline.shapes.judge import judge
from pipeline.text_tokenizer.bpe import TextTokenizer


class Reward(Protocol):
    """What tuning raises."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """A number for each image beside its own prompt."""


def reward_of(config: TuneConfig, text_tokenizer: TextTokenizer, reranker: Path | None) -> Reward:
    """The reward that the config names. `reranker`: the model's folder, for a run that has one.

    Raises:
        UserError: there is no such model, or it is of another text tokenizer.
    """
    if config.reward == "judge":
        return _shown
    folder = Path(config.clip) if config.clip else reranker
    assert folder is not None  # PipelineConfig has checked it
    return Ranker.from_pretrained(folder, text_tokenizer, distributed.device()).scores


def _shown(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """1 for an image that shows just what its prompt says, else 0 (`shapes/judge.py`)."""
    return [float(judge(image, prompt).right) for image, prompt in zip(images, prompts, strict=True)]
