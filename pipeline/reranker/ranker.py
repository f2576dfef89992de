"""One interface to the run's own reranker and to a pretrained CLIP, and how well either finds its captions.

ranker = Ranker.from_pretrained("runs/openmoji/reranker/model", text_tokenizer, device)
ranker.scores(images, prompts)      # 100 cos(image, prompt), one an image
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
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.metrics.clip_score import own_caption_ranks
from pipeline.reranker.model import TwoTowers
from pipeline.text_tokenizer.bpe import TextTokenizer

_BATCH = 256


class Ranker:
    """Embeds images and captions into one space."""

    def __init__(self, towers: TwoTowers | ClipScorer, text_tokenizer: TextTokenizer) -> None:
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
            return cls(ClipScorer(values["path"], device), text_tokenizer)
        if values.get("kind") != "towers":
            return cls(ClipScorer(str(directory), device), text_tokenizer)
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
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Float32 [n, E] on the CPU, any length."""
        if isinstance(self.towers, ClipScorer):
            judge = self.towers.images
            return torch.cat([judge.network(judge.input(list(part)))[0].float().cpu() for part in _parts(images)])
        side = self.towers.image_size
        device = self.towers.image_position.device
        resized = [p if p.size == (side, side) else p.resize((side, side), Image.Resampling.LANCZOS) for p in images]
        return torch.cat([self.towers.images(_pixels(part).to(device)).cpu() for part in _parts(resized)])

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Float32 [n, E] on the CPU, any length."""
        if isinstance(self.towers, ClipScorer):
            return self.towers.captions(captions)
        device = self.towers.image_position.device
        ids = self.text_tokenizer.encode(captions).to(device)
        return torch.cat([self.towers.captions(part).cpu() for part in ids.split(_BATCH)])

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """100 cos(image, prompt), -100 to 100, of each image and its own prompt."""
        texts = list(dict.fromkeys(prompts))
        embedded = self.embed_captions(texts)[[texts.index(prompt) for prompt in prompts]]
        found: list[float] = (100 * torch.cosine_similarity(self.embed_images(images), embedded)).tolist()
        return found


def retrieval(ranker: Ranker, samples: Iterable[Sample], limit: int) -> dict[str, float]:
    """How often an image finds its own caption among the first k of n, and a caption its image.

    Returns:
        {"image to text R@1", "image to text R@5", "text to image R@1", "text to image R@5": 0 to 1, "samples": n}
    """
    chosen = [sample for sample, _ in zip(samples, range(limit), strict=False)]
    if not chosen:
        raise UserError("reranker: the validation split is empty: raise prepare.validation_fraction")
    images, captions = (
        ranker.embed_images([s.image for s in chosen]),
        ranker.embed_captions([s.caption for s in chosen]),
    )
    metrics: dict[str, float] = {}
    for direction, ranks in (
        ("image to text", own_caption_ranks(images, captions)),
        ("text to image", own_caption_ranks(captions, images)),
    ):
        metrics |= {f"{direction} R@{k}": float((ranks < k).double().mean()) for k in (1, 5)}
    return metrics | {"samples": float(len(chosen))}


def _parts(images: Sequence[Image.Image]) -> Iterable[Sequence[Image.Image]]:
    return (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))


def _pixels(images: Sequence[Image.Image]) -> Tensor:
    """uint8 [n, 3, H, W]; images of one size."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
