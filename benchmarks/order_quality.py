"""How good transformers of each order are after the same CPU time of training, on the tokens of one finished run.

    python -m benchmarks.order_quality RUN --minutes 60         # RUN: finished up to the stage tokenize

Of each order and seed: the time of a step, the Fréchet distance on Lite0's features between images of training captions
and these samples' own images through the image tokenizer, and the mean negative log-likelihood of the codes in holes of
validation images: raster's given what comes before each, any's given all that stays, scale's given coarser levels.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from PIL import Image
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.data.sampler import TokenSampler
from pipeline.extractors.registry import load_extractor
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.metrics.frechet import frechet_distance
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.image_prompt import ImagePrompt, known_codes
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.build import build_transformer
from pipeline.transformer.cross_entropy import Part, cross_entropy
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.orders import random_orders, sorted_within_levels

CPU = torch.device("cpu")
HOLES = {"lower right": (0.5, 0.5, 1.0, 1.0), "centre": (0.25, 0.25, 0.75, 0.75)}  # left, top, right, bottom
BATCH, WARM_UP = 16, 0.05  # samples of a step; part of the time in which the learning rate rises


@dataclass(frozen=True)
class Found:
    """Of one training."""

    step_ms: float
    distance: float  # Fréchet
    holes: dict[str, float]  # nats per code

    def __str__(self) -> str:
        holes = ", ".join(f"{name} {nats:.4f}" for name, nats in self.holes.items())
        return f"{self.step_ms:7.1f} ms a step, FD(Lite0) {self.distance:7.2f}, nats a code: {holes}"


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--minutes", default=60.0, show_default=True, help="of CPU time, of each training")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--order", "orders", multiple=True, default=("raster", "any", "scale"), show_default=True)
@click.option("--passes", default=32, show_default=True, help="of order any")
@click.option("--images", default=500, show_default=True, help="that the distance is of")
@click.option("--layers", default=6, show_default=True)
@click.option("--width", default=256, show_default=True)
@click.option("--learning-rate", default=1e-3, show_default=True)
def main(
    run: Path,
    minutes: float,
    seeds: str,
    orders: tuple[str, ...],
    passes: int,
    images: int,
    layers: int,
    width: int,
    learning_rate: float,
) -> None:
    """FD and holes of each order after the same time of training, by seed."""
    torch.set_num_threads(1)
    found: dict[str, list[Found]] = {order: [] for order in orders}
    for seed in map(int, seeds.split(",")):
        for order in orders:
            config = TransformerConfig.model_validate(
                {"layers": layers, "width": width, "heads": width // 64 or 1, "style": "modern", "order": order}
            )
            model, step_ms = trained(run / "tokenize", config, seed, 60 * minutes, learning_rate)
            sampling = SamplingConfig(passes=passes) if order == "any" else SamplingConfig()
            found[order].append(Found(step_ms, distance(run, model, sampling, images), holes(run, model)))
            print(f"seed {seed}  {order:<6} {found[order][-1]}", flush=True)
    for order, own in found.items():
        values = {"FD(Lite0)": [one.distance for one in own]}
        values |= {name: [one.holes[name] for one in own] for name in HOLES}
        told = ", ".join(
            f"{name} {statistics.mean(v):.4f} ({min(v):.4f} to {max(v):.4f})" for name, v in values.items()
        )
        print(f"{order:<6} {statistics.median(one.step_ms for one in own):.1f} ms a step, {told}")


def trained(
    tokens: Path, config: TransformerConfig, seed: int, seconds: float, learning_rate: float
) -> tuple[Transformer, float]:
    """A model after so many seconds of CPU time in training steps, and the median ms of a step."""
    sampler = TokenSampler(tokens, "train", seed, rank=0, world_size=1)
    arrays = sampler.arrays
    layout = Layout.of(arrays.text_length, arrays.text_vocab_size, arrays.levels)
    torch.manual_seed(seed)
    objective = JointObjective(build_transformer(layout, config), config, seed).train()
    optimizer = torch.optim.AdamW(objective.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    spent: list[float] = []
    for step, batch in enumerate(sampler.batches(0, BATCH)):
        part = sum(spent) / seconds
        if part >= 1:
            break
        start = time.process_time()
        rate = learning_rate * min(part / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, _ = objective(batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        spent.append(time.process_time() - start)
    return objective.transformer.eval(), 1000 * statistics.median(spent)


def distance(run: Path, model: Transformer, sampling: SamplingConfig, images: int) -> float:
    """Fréchet, of images of training captions to these samples' own through the image tokenizer."""
    text_tokenizer = TextTokenizer.from_pretrained(run / "text-tokenizer")
    image_tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    pipeline = Pipeline(text_tokenizer, model, image_tokenizer)
    real: list[Image.Image] = []
    captions: list[str] = []
    for batch in _samples(run, "train", images):
        captions += [text_tokenizer.decode(row) for row in batch["text"]]
        real += pipeline.decode(batch["codes"])
    generated = [one.image for one in pipeline.generate(captions, sampling=sampling, batch_size=BATCH)]
    extractor = load_extractor("efficientnet-lite0", CPU)
    return frechet_distance(extractor(real).features, extractor(generated).features)


@torch.no_grad()
def holes(run: Path, model: Transformer) -> dict[str, float]:
    """Mean nats of the codes in each hole of 200 validation images."""
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    side = tokenizer.image_size
    found = {}
    for name, edges in HOLES.items():
        left, top, right, bottom = (round(side * edge) for edge in edges)
        mask = Image.new("L", (side, side))
        mask.paste(255, (left, top, right, bottom))
        hole_N = known_codes(tokenizer, ImagePrompt(Image.new("RGB", (side, side)), mask=mask), CPU) == UNKNOWN
        losses = [hole_losses(model, batch["text"], batch["codes"], hole_N) for batch in _samples(run, "val", 200)]
        found[name] = float(torch.cat(losses).mean())
    return found


def hole_losses(model: Transformer, text_BT: Tensor, codes_BN: Tensor, hole_N: Tensor) -> Tensor:
    """-log p of the codes in the hole, in nats, given what a model of its order knows when it draws them: [B, n]."""
    if isinstance(model, AnyOrderTransformer):
        places_BN = random_orders(codes_BN, model.layout, 0, 0).argsort(dim=1)
        order_BN = sorted_within_levels(places_BN + codes_BN.shape[1] * hole_N, model.layout)  # what stays first
        factors = model.hidden_and_head_weights(text_BT, codes_BN, order_BN)[1:]
        codes_BN, counted_BN = codes_BN.gather(1, order_BN), hole_N[order_BN]
    else:
        factors = model.hidden_and_head_weights(text_BT, codes_BN)[1:]
        counted_BN = hole_N.expand_as(codes_BN)
    targets = codes_BN.split([hidden.shape[1] for hidden, _ in factors], dim=1)
    losses = cross_entropy([Part(*own, target) for own, target in zip(factors, targets, strict=True)])
    return torch.cat(losses.plain, dim=1)[counted_BN].view(len(codes_BN), -1)


def _samples(run: Path, split: str, most: int) -> Iterator[dict[str, Tensor]]:
    """`most` samples of a split, or all, in batches."""
    sampler = TokenSampler(run / "tokenize", split, 0, rank=0, world_size=1)
    left = min(most, len(sampler))
    for batch in sampler.batches(0, BATCH):
        if left <= 0:
            return
        yield {name: values[:left] for name, values in batch.items()}
        left -= BATCH


if __name__ == "__main__":
    main()
