"""pFID: the Fréchet distance of reconstructions from wrong codes, as a generator would draw some (Qiu et al. 2025).

Of the codes of each image a share α, drawn at random, is replaced by one of the δ codes whose vectors are nearest to
its own, itself among them, each as likely. Reconstruction alone does not tell how a tokenizer bears that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.image_io import to_pil, to_tensor
from pipeline.core.image_size import images_at_once
from pipeline.core.iteration import batched
from pipeline.core.seeds import hash63
from pipeline.evaluation.image_sets import StoredImage
from pipeline.evaluation.reconstruction import images_in_memory
from pipeline.extractors.base import Extractor, FeatureSet
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.image_tokenizer.quantizers.base import Quantizer
from pipeline.image_tokenizer.quantizers.multiscale import MultiscaleQuantizer
from pipeline.image_tokenizer.vqvae import VQVAE

_DISTANCES = 1 << 24  # between codes, at a time


@torch.inference_mode()
def perturbed_features(
    tokenizer: ImageTokenizer,
    images: Sequence[StoredImage],
    perturbation: tuple[float, int],
    extractor: Extractor,
    batch_size: int,
    seed: int,
) -> FeatureSet:
    """Features of the reconstructions of `images` with codes perturbed by (α, δ).

    Raises:
        UserError: the tokenizer has no vectors of codes that could be compared.
    """
    share, nearest = perturbation
    books, device = code_vectors(tokenizer), next(tokenizer.parameters()).device
    features: list[Tensor] = []
    at_once = min(batch_size, images_at_once(tokenizer.height, tokenizer.width))
    # One for each image, so that it does not matter where batches are cut.
    generators = (torch.Generator().manual_seed(hash63("perturbed codes", seed, i)) for i in range(len(images)))
    for some in batched(images, images_in_memory(tokenizer, batch_size)):
        rebuilt = []
        for batch in batched(some, at_once):
            codes = tokenizer.encode(to_tensor([image.image for image in batch]).to(device))
            drawn_by = list(islice(generators, len(batch)))
            wrong = [perturbed(level, book, share, nearest, drawn_by) for level, book in zip(codes, books, strict=True)]
            rebuilt += to_pil(tokenizer.decode(wrong))
        features.append(extractor(rebuilt, len(rebuilt), "features of perturbed reconstructions").features)
    return FeatureSet(torch.cat(features), None, extractor.info)


def perturbed(
    codes_Bn: Tensor, vectors_KD: Tensor, share: float, nearest: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """`codes_Bn` with about `share` of them replaced by one of the `nearest` codes of each.

    `generators`: one for each of the B images, on the CPU.
    """
    nearest = min(nearest, len(vectors_KD))
    used_U, where_Bn = codes_Bn.unique(return_inverse=True)
    near = [
        torch.cdist(some, vectors_KD).topk(nearest, largest=False).indices
        for some in vectors_KD[used_U].split(max(1, _DISTANCES // len(vectors_KD)))
    ]
    n = codes_Bn.shape[1:]
    drawn_Bn = torch.stack([torch.randint(nearest, n, generator=one) for one in generators]).to(codes_Bn.device)
    chances_Bn = torch.stack([torch.rand(n, generator=one) for one in generators]).to(codes_Bn.device)
    replaced_Bn = chances_Bn < share
    return torch.where(replaced_Bn, torch.cat(near)[where_Bn, drawn_Bn], codes_Bn)


def code_vectors(tokenizer: ImageTokenizer) -> list[Tensor]:
    """Of each level the vectors `[K, D]` of its codes, as far as differences between them go.

    Raises:
        UserError: the tokenizer has none, or its levels are no sums of vectors.
    """
    if not isinstance(tokenizer, VQVAE):
        raise UserError("pFID needs a tokenizer that is a VQ-VAE of ours: leave evaluate.perturbations empty")
    books = []
    for quantizer in tokenizer.quantizers:
        assert isinstance(quantizer, Quantizer)
        if isinstance(quantizer, MultiscaleQuantizer):
            raise UserError("pFID is not defined for quantizer multiscale: leave evaluate.perturbations empty")
        sizes, device = quantizer.codebook_sizes, next(tokenizer.parameters()).device
        for level, size in enumerate(sizes):
            codes = [torch.zeros(1, size, dtype=torch.int64, device=device) for _ in sizes]
            codes[level] = torch.arange(size, device=device)[None]
            books.append(quantizer.vectors(codes)[0].float())
    return books
