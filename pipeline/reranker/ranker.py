"""One interface to the run's own reranker and to a pretrained CLIP, and how well either finds its captions.

ranker = Ranker.from_pretrained("runs/openmoji/reranker/model", text_tokenizer, device)
ranker.scores(pictures, prompts)      # 100 cos(picture, prompt), one a picture
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.data.shards import Sample
from pipeline.extractors.hf import CaptionJudge
from pipeline.metrics.clip_score import own_caption_ranks
from pipeline.reranker.model import TwoTowers
from pipeline.text_tokenizer.bpe import TextTokenizer

_BATCH = 256


class Ranker:
    """Embeds pictures and captions into one space."""

    def __init__(self, towers: TwoTowers | CaptionJudge, text_tokenizer: TextTokenizer) -> None:
        self.towers, self.text_tokenizer = towers, text_tokenizer

    @classmethod
    def from_pretrained(cls, directory: Path, text_tokenizer: TextTokenizer, device: torch.device) -> Ranker:
        """A folder of the reranker stage, or one that transformers' CLIPModel.save_pretrained wrote.

        Raises:
            UserError: it is neither, or was trained with another text tokenizer.
        """
        config = directory / "config.json"
        if not config.is_file():
            raise UserError(f"no reranker at {directory}: expected a folder with config.json, of a run or of a CLIP")
        values = read_json(config)
        if values.get("kind") == "clip":  # the stage's note that a pretrained one is to be used
            return cls(CaptionJudge(values["path"], device), text_tokenizer)
        if values.get("kind") != "towers":
            return cls(CaptionJudge(str(directory), device), text_tokenizer)
        towers = TwoTowers.from_pretrained(directory)
        found = (text_tokenizer.text_length, text_tokenizer.vocab_size)
        if (towers.text_length, towers.text_vocab_size) != found:
            expected = (towers.text_length, towers.text_vocab_size)
            raise UserError(
                f"{directory}: expected a text tokenizer of length and vocabulary {expected}, found {found}:"
                " run the stage reranker again"
            )
        return cls(towers.to(device), text_tokenizer)

    @torch.inference_mode()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Float32 [n, E] on the CPU, any length."""
        if isinstance(self.towers, CaptionJudge):
            judge = self.towers.images
            return torch.cat([judge.network(judge.input(list(part)))[0].float().cpu() for part in _parts(pictures)])
        side = self.towers.image_size
        device = self.towers.image_position.device
        resized = [p if p.size == (side, side) else p.resize((side, side), Image.Resampling.LANCZOS) for p in pictures]
        return torch.cat([self.towers.images(_pixels(part).to(device)).cpu() for part in _parts(resized)])

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Float32 [n, E] on the CPU, any length."""
        if isinstance(self.towers, CaptionJudge):
            return self.towers.captions(captions)
        device = self.towers.image_position.device
        ids = self.text_tokenizer.encode(captions).to(device)
        return torch.cat([self.towers.captions(part).cpu() for part in ids.split(_BATCH)])

    def scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """100 cos(picture, prompt), -100 to 100, of each picture and its own prompt."""
        texts = list(dict.fromkeys(prompts))
        embedded = self.captions(texts)[[texts.index(prompt) for prompt in prompts]]
        found: list[float] = (100 * torch.cosine_similarity(self.images(pictures), embedded)).tolist()
        return found


def retrieval(ranker: Ranker, samples: Iterable[Sample], limit: int) -> dict[str, float]:
    """How often a picture finds its own caption among the first k of n, and a caption its picture.

    Returns:
        {"image to text R@1", "image to text R@5", "text to image R@1", "text to image R@5": 0 to 1, "samples": n}
    """
    chosen = [sample for sample, _ in zip(samples, range(limit), strict=False)]
    if not chosen:
        raise UserError("reranker: the validation split is empty: raise prepare.validation_fraction")
    images, captions = ranker.images([s.image for s in chosen]), ranker.captions([s.caption for s in chosen])
    figures: dict[str, float] = {}
    for direction, ranks in (
        ("image to text", own_caption_ranks(images, captions)),
        ("text to image", own_caption_ranks(captions, images)),
    ):
        figures |= {f"{direction} R@{k}": float((ranks < k).double().mean()) for k in (1, 5)}
    return figures | {"samples": float(len(chosen))}


def _parts(pictures: Sequence[Image.Image]) -> Iterable[Sequence[Image.Image]]:
    return (pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH))


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """uint8 [n, 3, H, W]; pictures of one size."""
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
