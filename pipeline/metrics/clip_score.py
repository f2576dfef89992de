"""CLIP score (Hessel et al. 2021, eq. 1, with w = 100) and retrieval: how well images fit their captions.

Both are taken from embeddings in one space, which `extractors/clip_scorer.py` or the reranker makes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.metrics.neighbours import blocks


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """100 · max(cos, 0) of each image `[n, d]` and its caption `[n, d]`: float64 `[n]`."""
    return 100 * _cosines(images, captions).clamp(min=0)


def own_caption_ranks(images: Tensor, captions: Tensor) -> Tensor:
    """How many captions are nearer to each image than its own: int64 `[n]`. Equal captions do not count."""
    images, captions = (nn.functional.normalize(values.double(), dim=1) for values in (images, captions))
    own = (images * captions).sum(dim=1, keepdim=True)
    ranks = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for rows in blocks(len(images)):
        for columns in blocks(len(captions)):
            ranks[rows] += (images[rows] @ captions[columns].T > own[rows] + 1e-9).sum(dim=1)
    return ranks


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise UserError(f"CLIP score: expected a caption for each image, found {len(b)} for {len(a)}")
    return nn.functional.cosine_similarity(a.double(), b.double(), dim=1)
