"""The order of generation as a strip: an image after each quarter of its passes, of raster models of its codes.

    order_strip(pipeline, "red heart", 0, seed, sampling).save("order.png")

What is not there yet is filled with the likeliest codes, given what is, and veiled in gray: squares of the finest
level. So with several levels one sees what the coarser ones have decided.

Shapes: N codes of all levels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.level import Level
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.pass_decode import begin, draws_in_passes
from pipeline.sampling.pipeline import Pipeline
from pipeline.transformer.model import Transformer

QUARTERS = 4
_GRAY, _VEIL = 128.0, 0.6


def order_strip(pipeline: Pipeline, prompt: str, number: int, seed: int, sampling: SamplingConfig) -> Image.Image:
    """The first candidate of prompt `number` after each quarter of its passes; less often if there are less."""
    model = pipeline.transformer
    device, levels = model.head.weight.device, model.layout.levels
    text_1T = pipeline.text_tokenizer.encode([prompt]).to(device)
    uniforms_1N = candidate_uniforms(seed, number, 0, numbers_per_image(model))[None].to(device)
    likeliest = sampling.model_copy(update={"temperature": 0.0, "temperature_end": None, "speculate": None})
    count = model.layout.image_length
    found = states(model, text_1T, uniforms_1N, sampling)
    tiles: list[Tile] = []
    for passes in sorted({math.ceil(len(found) * quarter / QUARTERS) for quarter in range(1, QUARTERS + 1)}):
        codes_N = found[passes - 1]
        there_N = codes_N != UNKNOWN
        one = torch.zeros(1, dtype=torch.int64, device=device)
        filled_1N = draw_codes(model, text_1T, one, uniforms_1N, likeliest, known_PN=codes_N[None])
        image = pipeline.decode(filled_1N)[0]
        finest_n = there_N[count - levels[-1].positions :].cpu()
        tiles.append(Tile(veiled(image, finest_n, levels[-1]), f"{int(there_N.sum())} of {count} codes"))
    return grid([Group("", tiles)], columns=QUARTERS)


@torch.inference_mode()
def states(model: Transformer, text_1T: Tensor, uniforms_1N: Tensor, sampling: SamplingConfig) -> list[Tensor]:
    """The codes [N] after each pass (of raster models each code), UNKNOWN where none is yet."""
    one = torch.zeros(1, dtype=torch.int64, device=text_1T.device)
    if draws_in_passes(model):
        codes_1N, passes = begin(model, text_1T, one, uniforms_1N, sampling)
        return [codes_1N[0].clone() for _ in passes]
    codes_N = draw_codes(model, text_1T, one, uniforms_1N, sampling)[0]
    places_N = torch.arange(len(codes_N), device=codes_N.device)
    return [codes_N.masked_fill(places_N >= drawn, UNKNOWN) for drawn in range(1, len(codes_N) + 1)]


def veiled(image: Image.Image, there_n: Tensor, level: Level) -> Image.Image:
    """`image` with the squares of codes that are not `there`, bool [n], in gray."""
    there = Image.fromarray(there_n.view(level.height, level.width).numpy().astype(np.uint8) * 255)
    shown = np.asarray(there.resize(image.size, Image.Resampling.NEAREST))[..., None] > 0
    pixels = np.asarray(image).astype(np.float32)
    return Image.fromarray(np.where(shown, pixels, pixels + _VEIL * (_GRAY - pixels)).astype(np.uint8))
