"""One interface to the run's own reranker and to a pretrained CLIP, and retrieval as the measure of either.

ranker = Ranker.from_pretrained("runs/openmoji/reranker/model", text_tokenizer, device)
ranker.scores(images, prompts)      # 100 cos(image, prompt), one per image
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.config.base import digest
from pipeline.core.atomic_io import read_json, sha256_file
from pipeline.core.errors import UserError
from pipeline.core.image_io import to_uint8_tensor
from pipeline.core.image_size import height_width
from pipeline.core.iteration import batched
from pipeline.data.shards import Sample
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.metrics.clip_score import own_caption_ranks
from pipeline.reranker.model import TwoTowers
from pipeline.text_tokenizer.bpe import TextTokenizer

_BATCH = 256


class Ranker:
    """Embeds images and captions into one space, and scores an image by its prompt there.

    Attributes:
        model: the run's own towers, or a pretrained CLIP.
        text_tokenizer: that of the run; a CLIP has its own.
    """

    def __init__(
        self, model: TwoTowers | ClipScorer, text_tokenizer: TextTokenizer, folder: Path | None = None
    ) -> None:
        self.model, self.text_tokenizer, self._folder = model, text_tokenizer, folder

    @cached_property
    def model_hash(self) -> str:
        """Of the files in the folder that it was loaded from; empty, where it comes from none."""
        files = sorted(path for path in self._folder.iterdir() if path.is_file()) if self._folder else []
        return digest({path.name: sha256_file(path) for path in files}) if files else ""

    @classmethod
    def from_pretrained(cls, directory: Path, text_tokenizer: TextTokenizer, device: torch.device) -> Ranker:
        """Load a folder that the reranker stage or transformers' CLIPModel.save_pretrained wrote.

        Raises:
            UserError: it is neither, or was trained with another text tokenizer.
        """
        config = directory / "config.json"
        if not config.is_file():
            raise UserError(f"no reranker at {directory}: expected a folder with config.json, of a run or of a CLIP")
        values = read_json(config)
        if values.get("kind") == "clip":  # the stage's note that a pretrained one is to be used
            return cls(ClipScorer(values["path"], device), text_tokenizer, Path(values["path"]))
        if values.get("kind") != "towers":
            return cls(ClipScorer(str(directory), device), text_tokenizer, directory)
        towers = TwoTowers.from_pretrained(directory)
        found = (text_tokenizer.text_length, text_tokenizer.vocab_size)
        if (towers.text_length, towers.text_vocab_size) != found:
            expected = (towers.text_length, towers.text_vocab_size)
            raise UserError(
                f"{directory}: expected a text tokenizer of length and vocabulary {expected}, found {found}:"
                " run the stage reranker again"
            )
        return cls(towers.to(device), text_tokenizer, directory)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of images of any sizes, float32 [n, E] on the CPU, of any length."""
        return torch.cat([self._embed(batch).float().cpu() for batch in batched(images, _BATCH)])

    def _embed(self, images: list[Image.Image]) -> Tensor:
        """Embeddings [n, E] of one batch, on the model's device."""
        if isinstance(self.model, ClipScorer):
            embeddings: Tensor = self.model.images.network(self.model.images.input(images))[0]
            return embeddings
        size = height_width(self.model.image_size)[::-1]
        resized = [i if i.size == size else i.resize(size, Image.Resampling.LANCZOS) for i in images]
        return self.model.embed_images(to_uint8_tensor(resized).to(self.model.image_position.device))

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, float32 [n, E] on the CPU, of any length."""
        if isinstance(self.model, ClipScorer):
            return self.model.captions(captions)
        ids_nT = self.text_tokenizer.encode(captions).to(self.model.image_position.device)
        return torch.cat([self.model.embed_captions(batch).cpu() for batch in ids_nT.split(_BATCH)])

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each image by its own prompt: 100 cos(image, prompt), -100 to 100."""
        texts = list(dict.fromkeys(prompts))
        embedded = self.embed_captions(texts)[[texts.index(prompt) for prompt in prompts]]
        found: list[float] = (100 * torch.cosine_similarity(self.embed_images(images), embedded)).tolist()
        return found


def retrieval(ranker: Ranker, samples: Iterable[Sample], limit: int) -> dict[str, float]:
    """Recall at k: how often an image's own caption is among the first k of n, and a caption's image.

    Args:
        samples: of them the first `limit` are measured.

    Returns:
        {"image to text R@1", "image to text R@5", "text to image R@1", "text to image R@5": 0 to 1, "samples": n}

    Raises:
        UserError: no samples.
    """
    texts: list[str] = []
    embedded: list[Tensor] = []
    for batch in batched(islice(samples, limit), _BATCH):  # thousands of decoded images are gigabytes
        embedded.append(ranker.embed_images([sample.image for sample in batch]))
        texts += [sample.caption for sample in batch]
    if not texts:
        raise UserError("reranker: the validation split is empty: raise prepare.validation_fraction")
    images, captions = torch.cat(embedded), ranker.embed_captions(texts)
    metrics: dict[str, float] = {}
    for direction, ranks in (
        ("image to text", own_caption_ranks(images, captions)),
        ("text to image", own_caption_ranks(captions, images)),
    ):
        metrics |= {f"{direction} R@{k}": float((ranks < k).double().mean()) for k in (1, 5)}
    return metrics | {"samples": float(len(texts))}
