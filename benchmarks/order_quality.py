"""How good transformers of each order are after the same CPU time of training, on the tokens of one finished run.

    python -m benchmarks.order_quality RUN --minutes 60         # RUN: finished up to the stage tokenize
    python -m benchmarks.order_quality RUN --seeds 0 --sheet holes.png         # and holes as each order fills them

Of each order and seed: the time of a step, the Fréchet distance on Lite0's features between images of training captions
and these samples' own images through the image tokenizer, and the mean negative log-likelihood of the codes in holes of
validation images: raster's given what comes before each, any's given all that stays, scale's given coarser levels.
The first seed's model of each order chooses with what it is sampled (`TRIED`): by its distance on validation captions.
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
from pipeline.core.arithmetic import cpu_has_bf16
from pipeline.core.image_io import to_pil
from pipeline.core.malloc import keep_freed
from pipeline.data.sampler import TokenSampler
from pipeline.extractors.registry import load_extractor
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.metrics.frechet import frechet_distance
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.grid import Group, Tile, grid
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
SHOWN = 8  # images of a sheet
BATCH, WARM_UP = 16, 0.05  # samples of a step; part of the time in which the learning rate rises
CHOOSING = 200  # validation captions that settings are chosen by
HOLE_ORDERS = 8  # random orders whose mixture an any-order model's likelihood of a hole is
TEMPERATURES = (1.0, 0.85, 0.7, 0.5)
TRIED: dict[str, list[dict[str, object]]] = {
    "raster": [{"temperature": t} for t in TEMPERATURES],
    "any": [{"temperature": t, "pass_order": order} for order in ("random", "halton") for t in TEMPERATURES],
    "scale": [{"temperature": t, "temperature_end": end} for t in (1.0, 0.7, 0.4) for end in (1.0, 0.7)],
}


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
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option("--temperature", type=float, help="of all orders; without it the first seed's models choose")
@click.option("--sheet", type=click.Path(path_type=Path), help="a .png: holes as the first seed's models fill them")
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
    temperature: float | None,
    sheet: Path | None,
) -> None:
    """FD and holes of each order after the same time of training, by seed."""
    torch.set_num_threads(1)
    found: dict[str, list[Found]] = {order: [] for order in orders}
    groups = shown_holes(run) if sheet else {}
    judge = Judge(run, "train", images)
    chosen: dict[str, SamplingConfig] = {}
    if temperature is not None:
        chosen = {order: sampling_of(order, passes, temperature=temperature) for order in orders}
    for seed in map(int, seeds.split(",")):
        for order in orders:
            config = TransformerConfig.model_validate(
                {"layers": layers, "width": width, "heads": max(width // 64, 2), "style": "modern", "order": order}
            )
            model, step_ms = trained(run / "tokenize", config, seed, 60 * minutes, learning_rate)
            if order not in chosen:
                chosen[order] = choose(Judge(run, "val", CHOOSING), model, passes)
            sampling = chosen[order]
            found[order].append(Found(step_ms, judge(model, sampling), holes(run, model)))
            if sheet and len(found[order]) == 1:
                for name, shown in groups.items():
                    shown.append(Group(f"{name}, filled in order {order}", filled(run, model, sampling, name)))
                grid([group for shown in groups.values() for group in shown], SHOWN, side=96).save(sheet)
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
    keep_freed()  # as trainings do
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
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):  # as trainings are by default
            loss, _ = objective(batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        spent.append(time.process_time() - start)
    return objective.transformer.eval(), 1000 * statistics.median(spent)


class Judge:
    """Fréchet distances of images of a split's captions to these samples' own through the image tokenizer."""

    def __init__(self, run: Path, split: str, images: int) -> None:
        self._run, (self._captions, real) = run, _decoded(run, split, images)
        self._extractor = load_extractor("efficientnet-lite0", CPU)
        self._real = self._extractor(real).features

    def __call__(self, model: Transformer, sampling: SamplingConfig) -> float:
        drawn = _pipeline(self._run, model).generate(self._captions, sampling=sampling, batch_size=4 * BATCH)
        return frechet_distance(self._real, self._extractor([one.image for one in drawn]).features)


def sampling_of(order: str, passes: int, **settings: object) -> SamplingConfig:
    return SamplingConfig.model_validate(({"passes": passes} if order == "any" else {}) | settings)


def choose(judge: Judge, model: Transformer, passes: int) -> SamplingConfig:
    """With what a model's images are nearest, of what is tried for its order."""
    distances: dict[float, SamplingConfig] = {}
    for tried in TRIED[model.order]:
        sampling = sampling_of(model.order, passes, **tried)
        distances[own := judge(model, sampling)] = sampling
        print(f"  {model.order:<6} {own:7.2f} on validation captions with {tried}", flush=True)
    return distances[min(distances)]


@torch.no_grad()
def holes(run: Path, model: Transformer) -> dict[str, float]:
    """Mean nats of the codes in each hole of 200 validation images."""
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    found = {}
    for name in HOLES:
        hole_N = _hole(tokenizer, name)
        nats = [hole_nats(model, batch["text"], batch["codes"], hole_N) for batch in _samples(run, "val", 200)]
        found[name] = float(torch.cat(nats).mean() / hole_N.sum())
    return found


def hole_nats(model: Transformer, text_BT: Tensor, codes_BN: Tensor, hole_N: Tensor) -> Tensor:
    """-log p of the codes in the hole, given what a model of its order knows when it draws them: [B].

    An any-order model draws them in an order at random, so its p is the mean over orders, here of some.
    """
    if not isinstance(model, AnyOrderTransformer):
        factors = model.hidden_and_head_weights(text_BT, codes_BN)[1:]
        return _summed(factors, codes_BN, hole_N.expand_as(codes_BN))
    each = []
    for number in range(HOLE_ORDERS):
        places_BN = random_orders(codes_BN, model.layout, 0, number).argsort(dim=1)
        order_BN = sorted_within_levels(places_BN + codes_BN.shape[1] * hole_N, model.layout)  # what stays first
        factors = model.hidden_and_head_weights(text_BT, codes_BN, order_BN)[1:]
        each.append(_summed(factors, codes_BN.gather(1, order_BN), hole_N[order_BN]))
    return math.log(HOLE_ORDERS) - torch.stack(each).neg().logsumexp(dim=0)


def _summed(factors: list[tuple[Tensor, Tensor]], codes_BN: Tensor, counted_BN: Tensor) -> Tensor:
    """-log p of the counted codes: [B]."""
    targets = codes_BN.split([hidden.shape[1] for hidden, _ in factors], dim=1)
    losses = cross_entropy([Part(*own, target) for own, target in zip(factors, targets, strict=True)])
    return (torch.cat(losses.plain, dim=1) * counted_BN).sum(dim=1)


def shown_holes(run: Path) -> dict[str, list[Group]]:
    """The first validation images, through the image tokenizer, and what each hole leaves of them."""
    captions, images = _decoded(run, "val", SHOWN)
    whole = [Group("validation images", [Tile(*shown) for shown in zip(images, captions, strict=True)])]
    gray = Image.new("RGB", images[0].size, "gray")
    found = {}
    for name in HOLES:
        left = [Tile(Image.composite(gray, image, _mask(name, image.size))) for image in images]
        found[name] = [*whole, Group(f"{name}: what is known", left)]
        whole = []  # once
    return found


def filled(run: Path, model: Transformer, sampling: SamplingConfig, name: str) -> list[Tile]:
    """The same images, each with the codes of that hole drawn once."""
    pipeline = _pipeline(run, model)
    hole_N, tiles = _hole(pipeline.image_tokenizer, name), []
    for batch in _samples(run, "val", SHOWN):
        known_BN = batch["codes"].masked_fill(hole_N, UNKNOWN)
        each = torch.arange(len(known_BN))
        uniforms = torch.stack([candidate_uniforms(0, i, 0, numbers_per_image(model)) for i in each.tolist()])
        codes_BN = draw_codes(model, batch["text"], each, uniforms, sampling, known_BN)
        tiles += [Tile(image) for image in pipeline.decode(codes_BN)]
    return tiles


def _pipeline(run: Path, model: Transformer) -> Pipeline:
    image_tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    return Pipeline(TextTokenizer.from_pretrained(run / "text-tokenizer"), model, image_tokenizer)


def _hole(tokenizer: ImageTokenizer, name: str) -> Tensor:
    """Which codes are in it, bool [N]."""
    size = tokenizer.width, tokenizer.height
    prompt = ImagePrompt(Image.new("RGB", size), mask=_mask(name, size))
    return known_codes(tokenizer, prompt, CPU) == UNKNOWN


def _mask(name: str, size: tuple[int, int]) -> Image.Image:
    """A hole in white."""
    left, top, right, bottom = (round(side * edge) for side, edge in zip(size * 2, HOLES[name], strict=True))
    mask = Image.new("L", size)
    mask.paste(255, (left, top, right, bottom))
    return mask


@torch.no_grad()
def _decoded(run: Path, split: str, most: int) -> tuple[list[str], list[Image.Image]]:
    """Captions of samples, and their images through the image tokenizer."""
    text_tokenizer = TextTokenizer.from_pretrained(run / "text-tokenizer")
    image_tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    sizes = [level.positions for level in image_tokenizer.levels]
    captions: list[str] = []
    images: list[Image.Image] = []
    for batch in _samples(run, split, most):
        captions += [text_tokenizer.decode(row) for row in batch["text"]]
        images += to_pil(image_tokenizer.decode(list(batch["codes"].split(sizes, dim=1))))
    return captions, images


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
