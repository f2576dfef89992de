"""How long an image of 256 codes takes in raster order, in any order by its passes, and level by level.

    python -m benchmarks.orders          # what each is worth: order_quality.py

One thread, whose CPU time counts: on a quiet machine that is wall time, and on a busy one it says much the same. Raster
and every number of passes take turns, medians. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import torch

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.packed import packed
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

TEXT, TEXT_CODES, SIDE, CODES = 32, 2_048, 16, 8_192
SCALES = (1, 2, 3, 4, 5, 6, 8, 10)  # 255 codes
LAYERS, WIDTH, HEADS = 6, 256, 4
PASSES = (256, 64, 32, 16)


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 8), show_default=True)
def main(rounds: int, batches: tuple[int, ...]) -> None:
    """CPU time per batch of images, and how many times raster's speed that is."""
    torch.set_num_threads(1)
    raster, other, scale = built("raster"), packed(built("any")), packed(built("scale"))  # once, as `Pipeline` does
    for batch in batches:
        works: dict[str, Callable[[], object]] = {"raster": partial(draw, raster, batch, SamplingConfig())}
        for passes in PASSES:
            works[f"{passes} passes"] = partial(draw, other, batch, SamplingConfig(passes=passes))
        works["32 passes, confidence"] = partial(draw, other, batch, SamplingConfig(passes=32, pass_order="confidence"))
        works[f"scale, {len(SCALES)} levels"] = partial(draw, scale, batch, SamplingConfig())
        seconds = medians(works, rounds)
        for name, own in seconds.items():
            print(
                f"batch {batch}  {name:<22} {own * 1000:8.0f} ms  {seconds['raster'] / own:5.2f} x raster", flush=True
            )


def built(order: str) -> Transformer:
    shape = {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "style": "modern", "order": order}
    torch.manual_seed(0)
    sides = SCALES if order == "scale" else (SIDE,)
    layout = Layout.of(TEXT, TEXT_CODES, [(side, side, CODES) for side in sides])
    model = build_transformer(layout, TransformerShape.model_validate(shape))
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model.eval()


def draw(model: Transformer, batch: int, sampling: SamplingConfig) -> None:
    text = torch.randint(1, TEXT_CODES, (batch, TEXT), generator=torch.Generator().manual_seed(0))
    numbers = torch.stack([candidate_uniforms(0, i, 0, numbers_per_image(model)) for i in range(batch)])
    draw_codes(model, text, torch.arange(batch), numbers, sampling)


def medians(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, all by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(own) for name, own in seconds.items()}


if __name__ == "__main__":
    main()
