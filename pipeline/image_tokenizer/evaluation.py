"""How good a tokenizer is, measured on hard codes (what the transformer will see), and images to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipeline.core import distributed
from pipeline.core.image_io import to_pil
from pipeline.core.image_size import images_at_once
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.psnr_ssim import WINDOW, psnr, ssim

_SHOWN = 256  # pixels of a side on a grid of reconstructions, of which 16 are in a row


class Evaluation(NamedTuple):
    """What `evaluate` found."""

    metrics: dict[str, float]
    counts: list[Tensor]  # how often each code of a level occurs, float64 [K] per level


@contextmanager
def precision_of_codes(device: torch.device) -> Iterator[None]:
    """Inside, codes are those that `tokenize` writes: in float32, without the training's autocast and TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@torch.no_grad()
def evaluate(tokenizer: ImageTokenizer, batches: Iterable[dict[str, Tensor]]) -> Evaluation:
    """Reconstruction and codebook metrics over the `batches` {"images": uint8 [b,3,H,W]} of all ranks. Collective.

    In the precision that codes are made in, whatever the training's is.

    psnr: mean over images, dB, at most 100 each. ssim: mean over images (left out where they are smaller than its
    window). For each level (suffix `_0`, `_1`, … where there are several): codebook_usage, the share of codes that
    occur at all, in [0,1]; codebook_perplexity, exp of the entropy of how often they occur, in [1, K];
    code_entropy_bits, the same entropy in bits. bits_per_pixel: what an image's codes take at that entropy.
    """
    counts = [torch.zeros(level.codebook_size, dtype=torch.float64) for level in tokenizer.levels]
    sums = {"psnr": 0.0} | ({"ssim": 0.0} if min(tokenizer.height, tokenizer.width) >= WINDOW else {})
    images_seen = 0
    for batch in batches:
        images = _to_device(batch["images"], tokenizer)
        with precision_of_codes(images.device):
            codes = tokenizer.encode(images)
            reconstructions = tokenizer.decode(codes)
        for level_counts, level_codes in zip(counts, codes, strict=True):
            level_counts += torch.bincount(level_codes.flatten().cpu(), minlength=len(level_counts))
        sums["psnr"] += psnr(images, reconstructions).sum().item()
        if "ssim" in sums:
            sums["ssim"] += ssim(images, reconstructions).sum().item()
        images_seen += len(images)
    everywhere = distributed.all_gather_objects((sums, images_seen, counts))
    counts = [torch.stack(level).sum(0) for level in zip(*(part[2] for part in everywhere), strict=True)]
    total = max(1, sum(part[1] for part in everywhere))
    metrics = {name: sum(part[0][name] for part in everywhere) / total for name in sums}
    return Evaluation(metrics | _code_metrics(tokenizer, counts), counts)


def _code_metrics(tokenizer: ImageTokenizer, counts: list[Tensor]) -> dict[str, float]:
    metrics = {"bits_per_pixel": 0.0}
    for i, (level, level_counts) in enumerate(zip(tokenizer.levels, counts, strict=True)):
        suffix = f"_{i}" if len(counts) > 1 else ""
        share = level_counts / level_counts.sum().clamp_min(1)
        entropy = -torch.xlogy(share, share).sum().item()
        metrics[f"codebook_usage{suffix}"] = (level_counts > 0).double().mean().item()
        metrics[f"codebook_perplexity{suffix}"] = math.exp(entropy)
        metrics[f"code_entropy_bits{suffix}"] = entropy / math.log(2)
        metrics["bits_per_pixel"] += entropy / math.log(2) * level.positions / (tokenizer.height * tokenizer.width)
    return metrics


def collapsed(evaluation: Evaluation, floor: float) -> str | None:
    """One line on the levels that use less than `floor` of their codes, and what to try; None when all use more."""
    usage = [(counts > 0).double().mean().item() for counts in evaluation.counts]
    low = [f"{share:.1%} on level {i}" for i, share in enumerate(usage) if share < floor]
    if not low:
        return None
    return (
        f"codebook collapse: expected at least {floor:.0%} of the codes in use on the validation split, found"
        f" {', '.join(low)}: lower training.learning_rate, or raise dead_code_threshold (codebooks),"
        " batch_entropy_weight with logits: distance (dvae, gumbel) or entropy_weight (lfq), or take a smaller codebook"
    )


def usage_histogram(counts: list[Tensor]) -> Image.Image:
    """How often each code occurs, most frequent first, as a multiple of an even share; a line per level."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, level in enumerate(counts):
        ordered = (level.sort(descending=True).values * len(level) / level.sum().clamp_min(1)).numpy()
        used = int((level > 0).sum())
        axes.plot(range(1, len(level) + 1), ordered, label=f"level {i}: {used} of {len(level)} codes occur")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="code, most frequent first", ylabel="occurrences / even share", yscale="symlog")
    axes.set_ylim(bottom=0)
    axes.legend()
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


@torch.no_grad()
def reconstruction_grid(tokenizer: ImageTokenizer, images: Tensor, columns: int = 16) -> Image.Image:
    """Originals, and under each row of them their reconstructions. `images`: uint8 [n,3,H,W], n ≥ 1.

    Sides above `_SHOWN` pixels are halved until they are not.
    """
    parts = []
    for part in images.split(images_at_once(tokenizer.height, tokenizer.width)):
        originals = _to_device(part, tokenizer)
        with precision_of_codes(originals.device):
            both = torch.stack([originals, tokenizer.decode(tokenizer.encode(originals))])
        parts.append(_small(both.flatten(0, 1)).unflatten(0, (2, -1)).cpu())
    both = torch.cat(parts, dim=1)  # [2,n,3,H,W]
    rows = [torch.cat(list(half), dim=-1) for chunk in both.split(columns, dim=1) for half in chunk]  # [3,H,w·W]
    canvas = torch.ones(3, len(rows) * rows[0].shape[1], rows[0].shape[2])
    for i, row in enumerate(rows):
        canvas[:, i * row.shape[1] : (i + 1) * row.shape[1], : row.shape[2]] = row
    return to_pil(canvas[None])[0]


def _small(images: Tensor) -> Tensor:
    while max(images.shape[-2:]) > _SHOWN:
        images = F.avg_pool2d(images, 2)
    return images


def _to_device(images: Tensor, tokenizer: ImageTokenizer) -> Tensor:
    return images.to(next(tokenizer.parameters()).device).float() / 255
