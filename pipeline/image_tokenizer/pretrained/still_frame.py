"""The layers in time of Emu3's tokenizer, as what they are for an image: image_tokenizer/still_image.py.

A convolution in time sees its frame and two before, or four of which it makes one, and zeros before the first frame.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.config.image_tokenizer_model import VQGANConfig
from pipeline.config.quantizers import CodebookConfig
from pipeline.image_tokenizer.pretrained.weights import Weights

State = dict[str, Tensor]

_NORM_EPSILON = 1e-5  # of batch norms


def frames(weights: Weights) -> int:
    """How many frames of a video become one grid of codes: half of them in each convolution."""
    convolutions = 0
    while f"encoder.time_conv.{convolutions}.conv.conv.weight" in weights:
        convolutions += 1
    return 1 << convolutions


def tensors(weights: Weights, model: VQGANConfig) -> State:
    """Of both halves by our names."""
    (codebook,) = model.quantizers
    assert isinstance(codebook, CodebookConfig)
    latent, code = model.latent_width, codebook.code_width
    found = dict(_last_frame(weights, "quant_conv.conv", "quantizers.0.project", (code, latent, 3, 1, 1)))
    found |= _last_frame(weights, "post_quant_conv.conv", "decoder.stem.project", (latent, code, 3, 1, 1))
    kernel = (latent, latent, 3, 3, 3)
    for half, ours in (("encoder", "encoder.time"), ("decoder", "decoder.stem.time")):
        for j in range(model.blocks):
            block, own = f"{half}.time_res_stack.{j}", f"{ours}.blocks.{j}"
            for part in ("conv1", "conv2"):
                found |= _last_frame(weights, f"{block}.{part}.conv", f"{own}.{part}", kernel)
            for part in ("norm1", "norm2"):
                found |= _batch_norm(weights, f"{block}.{part}", f"{own}.{part}", latent)
    count, made = model.frames, 1
    for i in range(model.frames.bit_length() - 1):
        found |= _last_frame(weights, f"decoder.time_conv.{i}.conv.conv", f"decoder.stem.time.convs.{i}", kernel)
        found |= _halving(weights, f"encoder.time_conv.{i}.conv.conv", f"encoder.time.convs.{i}", count, made, latent)
        count //= 2
        made = count
    return found


def _last_frame(weights: Weights, theirs: str, ours: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Of a single frame: those before it are zeros."""
    kernel = weights.take(f"{theirs}.weight", *shape)[:, :, -1]
    yield f"{ours}.weight", kernel.flatten(1) if ours.startswith("quantizers") else kernel
    yield f"{ours}.bias", weights.take(f"{theirs}.bias", shape[0])


def _halving(weights: Weights, theirs: str, ours: str, count: int, differ: int, width: int) -> State:
    """From `count` frames, of which `differ` (all, or one that all are), to half as many, side by side as channels."""
    kernel = weights.take(f"{theirs}.weight", width, width, 4, 3, 3)
    after = count // 2
    wide = kernel.new_zeros(after, width, count, width, 3, 3)
    for made in range(after):
        for tap in range(4):
            if 0 <= (seen := 2 * made - 2 + tap) < count:
                wide[made, :, seen] += kernel[:, :, tap]
    if differ == 1:
        wide = wide.sum(2, keepdim=True)
    bias = weights.take(f"{theirs}.bias", width).repeat(after)
    return {f"{ours}.weight": wide.flatten(2, 3).flatten(0, 1), f"{ours}.bias": bias}


def _batch_norm(weights: Weights, theirs: str, ours: str, width: int) -> State:
    """As a factor and a summand of each channel, from its fixed statistics."""
    weight, bias, mean, variance = (
        weights.take(f"{theirs}.{name}", width).double() for name in ("weight", "bias", "running_mean", "running_var")
    )
    weights.take(f"{theirs}.num_batches_tracked")  # a count of its training
    factor = weight / torch.sqrt(variance + _NORM_EPSILON)
    return {f"{ours}.weight": factor.float().view(-1, 1, 1, 1), f"{ours}.bias": (bias - mean * factor).float()}
