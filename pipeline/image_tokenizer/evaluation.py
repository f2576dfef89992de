"""How good a tokenizer is, measured on hard codes (what the transformer will see), and pictures for a look."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from pipeline import distributed
from pipeline.image_tokenizer.base import ImageTokenizer


@torch.no_grad()
def evaluate(tokenizer: ImageTokenizer, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Reconstruction and codebook figures over the `batches` {"images": uint8 [b,3,H,W]} of all ranks. Collective.

    psnr: mean over pictures, dB, of 10·log10(1 / MSE) with pixels in [0,1]. For each level (suffix `_0`, `_1`, …
    where there are several): codebook_usage, the share of codes that occur at all, in [0,1]; codebook_perplexity,
    exp of the entropy of how often they occur, in [1, K]; code_entropy_bits, the same entropy in bits.
    """
    counts = [torch.zeros(level.codebook_size, dtype=torch.float64) for level in tokenizer.levels]
    psnr_sum, pictures = 0.0, 0
    for batch in batches:
        images = _to_device(batch["images"], tokenizer)
        codes = tokenizer.encode(images)
        for count, level_codes in zip(counts, codes, strict=True):
            count += torch.bincount(level_codes.flatten().cpu(), minlength=len(count))
        psnr_sum += psnr(images, tokenizer.decode(codes)).sum().item()
        pictures += len(images)
    everywhere = distributed.all_gather_objects((psnr_sum, pictures, counts))
    counts = [torch.stack(level).sum(0) for level in zip(*(part[2] for part in everywhere), strict=True)]
    figures = {"psnr": sum(part[0] for part in everywhere) / max(1, sum(part[1] for part in everywhere))}
    for i, count in enumerate(counts):
        suffix = f"_{i}" if len(counts) > 1 else ""
        share = count / count.sum().clamp_min(1)
        entropy = -torch.xlogy(share, share).sum().item()
        figures[f"codebook_usage{suffix}"] = (count > 0).double().mean().item()
        figures[f"codebook_perplexity{suffix}"] = math.exp(entropy)
        figures[f"code_entropy_bits{suffix}"] = entropy / math.log(2)
    return figures


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, [B], dB; both [B,3,H,W] in [0,1]. At most 100 (equal pictures)."""
    mse = (images.double() - reconstructions.double()).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


@torch.no_grad()
def reconstruction_grid(tokenizer: ImageTokenizer, images: Tensor, columns: int = 16) -> Image.Image:
    """Originals, and under each row of them their reconstructions. `images`: uint8 [n,3,H,W], n ≥ 1."""
    originals = _to_device(images, tokenizer)
    both = torch.stack([originals, tokenizer.decode(tokenizer.encode(originals))]).cpu()  # [2,n,3,H,W]
    rows = [torch.cat(list(half), dim=-1) for chunk in both.split(columns, dim=1) for half in chunk]  # [3,H,w·W]
    canvas = torch.ones(3, len(rows) * rows[0].shape[1], rows[0].shape[2])
    for i, row in enumerate(rows):
        canvas[:, i * row.shape[1] : (i + 1) * row.shape[1], : row.shape[2]] = row
    return Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy())


def _to_device(images: Tensor, tokenizer: ImageTokenizer) -> Tensor:
    return images.to(next(tokenizer.parameters()).device).float() / 255
