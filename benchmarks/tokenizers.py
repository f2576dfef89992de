"""Every kind of image tokenizer, trained for the same time on the same images, beside two peers.

    python -m benchmarks.tokenizers --data DIR --minutes 5         trains what is not in the results yet; the table
    python -m benchmarks.tokenizers --data DIR --minutes 2 --seeds 0,1,2 --kinds ema,fsq
    python -m benchmarks.tokenizers --data DIR --steps 400 --micro-batches 1,4,16 --kinds ema,lfq
                                                                   the same training with each of these per step
    python -m benchmarks.tokenizers --encode                       `encode` beside the bare encoder, K = 8192
    python -m benchmarks.tokenizers --table                        the table of what the results hold

DIR holds train/ and val/, folders of WebDataset tars or of images; without it, OpenMoji, every 16th image for
validation. Each (kind, seed) is a process of its own whose line is appended to `--results`: a broken run resumes there.
Schedules (learning rate, temperature, weights) run on the clock: a faster kind takes more steps in the same time.
32×32 images, half of them mirrored, to 8×8 codes (VQ-VAE-2: and 16×16) of 1,024, bfloat16 (float32 on a CPU without
it), metrics on the validation split.
docs/tokenizers.md says what they mean. What is trained: `OURS` here and the peers in benchmarks/contestants.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.contestants import NOMINAL_STEPS, PEERS, SIZE, Contestant, K, Ours
from pipeline.config.training import TrainingConfig
from pipeline.core.arithmetic import cpu_has_bf16
from pipeline.core.malloc import keep_freed
from pipeline.evaluation.image_sets import named_images
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.quantizers import Quantizer
from pipeline.metrics.psnr_ssim import psnr, ssim
from pipeline.training.ema import Ema
from pipeline.training.optimizer import set_learning_rates
from pipeline.training.schedule import learning_rate_factor

ARCHITECTURE = {"patch_size": 4, "widths": [128], "blocks": 2, "block_kernels": [3, 1], "bottleneck": 1}
ARCHITECTURE |= {"stem_kernel": 1, "reconstruction": "l2"}
LARGER: dict[str, Any] = {"patch_size": 1, "widths": [64, 128, 256]}  # with the blocks that are the default
TWO_RESOLUTIONS = ARCHITECTURE | {"patch_size": 2, "widths": [64, 128]}
CODEBOOK = {"kind": "ema", "codebook_size": K, "code_width": 8, "commitment_weight": 0.1}
GRADIENT = CODEBOOK | {"kind": "gradient"}
WIDE = CODEBOOK | {"code_width": 32, "commitment_weight": 0.25}
BINARY = {"kind": "lfq", "bits": 10, "commitment_weight": 0.01, "entropy_weight": 0.02}


def ramp(start: float, end: float, until: float = 0.9) -> dict[str, float]:
    return {"start": start, "end": end, "steps": int(NOMINAL_STEPS * until)}


RELAXED = {"codebook_size": K, "code_width": 8, "logits": "distance", "kl_weight": ramp(0, 0)}
RELAXED |= {"batch_entropy_weight": ramp(0.03, 0.003), "temperature": ramp(1.0, 0.05)}
DVAE = {**RELAXED, "batch_entropy_weight": ramp(0.003, 0, 0.5), "channels_last": True}


def vqvae(**quantizer: Any) -> dict[str, Any]:
    return {"kind": "vqvae", **ARCHITECTURE, "quantizer": quantizer}


OURS: dict[str, dict[str, Any]] = {
    "dvae": {"kind": "dvae", **ARCHITECTURE, **DVAE},
    "gumbel": vqvae(kind="gumbel", **RELAXED),
    "ema": vqvae(**CODEBOOK),
    "gradient": vqvae(**GRADIENT),
    "rotation": vqvae(**CODEBOOK, gradient="rotation"),
    "l2-normalized": vqvae(**GRADIENT | {"commitment_weight": 0.25}, normalize=True),
    "fsq": vqvae(kind="fsq", channels=[8, 5, 5, 5]),
    "lfq": vqvae(**BINARY),
    "bsq": vqvae(**BINARY | {"entropy_weight": 0.005}, spherical=True),
    "residual": vqvae(**WIDE, depth=4),
    "multiscale": vqvae(kind="multiscale", scales=[1, 2, 3, 4, 6, 8, 8, 8], codebook=WIDE),
    # Of 1,024 codes, drawn evenly, a grid of one code an image would show half on the validation split.
    "multiscale-books": vqvae(
        kind="multiscale",
        scales=[1, 2, 3, 4, 6, 8, 8, 8],
        codebook=WIDE | {"codebook_size": 256},
        codebook_per_scale=True,
    ),
    "vit": {"kind": "vit", "patch_size": 4, "width": 128, "layers": 2, "heads": 4, "quantizer": GRADIENT},
    "vqvae-two-resolutions": {"kind": "vqvae", **TWO_RESOLUTIONS, "quantizer": CODEBOOK},
    "vqvae2": {"kind": "vqvae2", **TWO_RESOLUTIONS, "quantizers": [CODEBOOK, CODEBOOK]},
}
TRAINING: dict[str, Any] = {"batch_size": 16, "learning_rate": 4e-3, "weight_decay": 0.05, "warmup_steps": 300}
TRAINING |= {"muon_learning_rate": 0.014}
PEER_TRAINING = {"batch_size": 16, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_steps": 300}


def contestant(kind: str) -> Contestant:
    return PEERS[kind]() if kind in PEERS else Ours(OURS[kind])


def images_of(folder: Path) -> Tensor:
    """uint8 [n,3,32,32]."""
    arrays = [np.asarray(p.resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for _, p in named_images(folder)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def splits(data: Path | None, cache: Path) -> tuple[Tensor, Tensor]:
    """Training and validation images, decoded once."""
    if not cache.exists():
        if data:
            found = {split: images_of(data / split) for split in ("train", "val")}
        else:
            every = openmoji()
            held = torch.arange(len(every)) % 16 == 0
            found = {"train": every[~held], "val": every[held]}
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache)
    found = torch.load(cache)
    return found["train"], found["val"]


def openmoji() -> Tensor:
    from benchmarks.data import shards
    from pipeline.data.shards import read_samples

    with tempfile.TemporaryDirectory() as folder:
        prepared = shards(Path(folder), SIZE)
        arrays = [np.asarray(sample.image) for split in ("train", "val") for sample in read_samples(prepared, split)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def train(
    kind: str,
    seed: int,
    minutes: float,
    steps: int | None,
    micro_batches: int,
    optimizer_kind: str,
    images: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Train one kind and measure it: the line of the results."""
    torch.manual_seed(seed)
    settings = PEER_TRAINING if kind in PEERS else TRAINING | {"optimizer": optimizer_kind}
    config = TrainingConfig(steps=NOMINAL_STEPS, **settings)
    made = contestant(kind)
    line = {"kind": kind, "seed": seed, "minutes": minutes, "micro_batches": micro_batches}
    line |= {"optimizer": config.optimizer, **fit(made, config, seed, minutes, steps, micro_batches, images[0])}
    line["parameters"] = sum(p.numel() for p in made.module.parameters())
    return line | metrics(made, images[1])


def fit(
    made: Contestant,
    config: TrainingConfig,
    seed: int,
    minutes: float,
    steps: int | None,
    micro_batches: int,
    images: Tensor,
) -> dict[str, Any]:
    """Train for so many minutes, or steps: how many there were, and how fast."""
    keep_freed()  # as trainings do
    optimizer = made.optimizer(config)
    held = {name: parameter.data for name, parameter in made.module.named_parameters()}
    ema = Ema(lambda: held, config.ema_decay) if config.ema_decay else None
    generator = torch.Generator().manual_seed(seed)
    order, used = torch.randperm(len(images), generator=generator), 0
    step = skipped = 0
    started = time.perf_counter()
    made.module.train()
    while True:
        spent = (time.perf_counter() - started) / (60 * minutes) if steps is None else step / steps
        if spent >= 1:
            break
        if used + config.batch_size > len(order):
            order, used = torch.randperm(len(images), generator=generator), 0
        batch = mirrored(images[order[used : used + config.batch_size]], generator)
        used += config.batch_size
        optimizer.zero_grad(set_to_none=True)
        parts = batch.chunk(micro_batches)
        if len(parts) > 1:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                made.look_ahead(parts, spent)
        for micro in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
                loss = made.loss(micro, spent) / micro_batches
            loss.backward()
        norm = nn.utils.clip_grad_norm_(made.module.parameters(), 1.0 if config.optimizer == "adamw" else math.inf)
        if torch.isfinite(norm):
            set_learning_rates(optimizer, learning_rate_factor(config, int(spent * NOMINAL_STEPS)))
            optimizer.step()
            if ema:
                ema.update()
        else:
            skipped += 1
        made.after_update(bool(torch.isfinite(norm)))
        step += 1
    seconds = time.perf_counter() - started
    if ema:
        ema.swap()
    rate = step * config.batch_size / seconds
    return {"steps": step, "seconds": round(seconds, 1), "images_per_s": rate, "skipped": skipped}


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of images [b,3,H,W] or its mirror image, as chance has it."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, images.flip(3), images)


@torch.no_grad()
def metrics(made: Contestant, validation: Tensor) -> dict[str, Any]:
    """In float32, on hard codes."""
    made.module.eval()
    counts = [torch.zeros(size) for size in made.sizes]
    decibels, similarity, bits = [], [], 0.0
    for batch in validation.split(max(1, 64 * SIZE**2 // validation[0, 0].numel())):
        images = batch.float() / 255
        codes = made.encode(images)
        for count, level in zip(counts, codes, strict=True):
            count += torch.bincount(level.flatten(), minlength=len(count))
        reconstructions = made.decode(codes)
        decibels.append(psnr(images, reconstructions))
        similarity.append(ssim(images, reconstructions))
    perplexity = []
    for count in counts:
        share = count / count.sum()
        entropy = -torch.xlogy(share, share).sum().item()
        perplexity.append(math.exp(entropy))
        bits += entropy / math.log(2) * count.sum().item() / (len(validation) * validation[0, 0].numel())
    return {
        "psnr": torch.cat(decibels).mean().item(),
        "ssim": torch.cat(similarity).mean().item(),
        "usage": [(count > 0).float().mean().item() for count in counts],
        "perplexity": perplexity,
        "bits_per_pixel": bits,
    }


def encode_speed() -> None:
    """`encode` beside the bare encoder's forward pass, K = 8192: around the table's encoder, and a larger one."""
    images = torch.rand(64, 3, SIZE, SIZE)
    print("Around the encoder of the table:\n")
    models = {kind: _with_8192_codes(model) for kind, model in OURS.items() if kind != "multiscale-books"}
    _encode_table(models, images)
    print(f"\nAround an encoder that begins at full resolution, widths {LARGER['widths']}:\n")
    large = {kind: model for kind, model in models.items() if kind not in ("vqvae-two-resolutions", "vit")}
    small = ARCHITECTURE.keys() - {"reconstruction"}
    larger = {kind: {n: v for n, v in model.items() if n not in small} | LARGER for kind, model in large.items()}
    _encode_table(larger, images[:16])


def _with_8192_codes(model: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(model).replace('"codebook_size": 1024', '"codebook_size": 8192')
    large: dict[str, Any] = json.loads(
        text.replace('"bits": 10', '"bits": 13').replace("[8, 5, 5, 5]", "[8, 8, 8, 4, 4]")
    )
    return large


def _encode_table(models: dict[str, dict[str, Any]], images: Tensor) -> None:
    """Best of the rounds, in which the two take turns; on one thread in CPU time, for a machine that is not quiet."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    print("| kind | encoder, images/s | encode, images/s | ratio |\n|---|---|---|---|")
    for kind, model in models.items():
        tokenizer = build(model, images.shape[-1]).eval()
        encoder, bare, whole = without_quantizer(tokenizer), [], []
        with torch.no_grad():
            for _ in range(7):
                begin = clock()
                encoder(images)
                middle = clock()
                tokenizer.encode(images)
                bare.append(middle - begin)
                whole.append(clock() - middle)
        fast = [len(images) / min(times) for times in (bare, whole)]
        print(f"| {kind} | {fast[0]:,.1f} | {fast[1]:,.1f} | {fast[1] / fast[0]:.2f} |", flush=True)


def without_quantizer(tokenizer: ImageTokenizer) -> Callable[[Tensor], list[Tensor]]:
    """`encode` with every code 0 for nothing: the encoder alone, and what finer grids need of the decoder."""
    bare = deepcopy(tokenizer)
    for quantizer in bare.get_submodule("quantizers").children():
        assert isinstance(quantizer, Quantizer)
        quantizer.encode = partial(_zeros, quantizer)
    return bare.encode


def _zeros(quantizer: Quantizer, features_BNC: Tensor) -> list[Tensor]:
    side = math.isqrt(features_BNC.shape[1])
    shapes = quantizer.grids(side, side)
    return [features_BNC.new_zeros(len(features_BNC), height * width, dtype=torch.int64) for height, width in shapes]


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per kind, medians over seeds; usage is the lowest of all seeds and levels."""
    rows = ["| kind | PSNR, dB | SSIM | lowest usage | perplexity | bits per pixel | images/s | parameters | seeds |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(line["kind"] for line in lines):
        mine = [line for line in lines if line["kind"] == kind]
        middle = {name: statistics.median(line[name] for line in mine) for name in MEDIANS}
        spread = f" ({min(x['psnr'] for x in mine):.2f} to {max(x['psnr'] for x in mine):.2f})" if len(mine) > 1 else ""
        perplexity = ", ".join(f"{value:,.0f}" for value in mine[0]["perplexity"])
        usage = min(min(line["usage"]) for line in mine)
        rows.append(
            f"| {kind} | {middle['psnr']:.2f}{spread} | {middle['ssim']:.3f} | {usage:.0%} | {perplexity} |"
            f" {middle['bits_per_pixel']:.2f} | {middle['images_per_s']:,.0f} | {middle['parameters'] / 1e6:.2f} M |"
            f" {len(mine)} |"
        )
    return "\n".join(rows)


def micro_batch_table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row per kind, seed and number of steps; how far the numbers of micro-batches lie apart."""
    cells: dict[tuple[str, int, int], dict[int, dict[str, Any]]] = {}
    for line in lines:
        cells.setdefault((line["kind"], line["seed"], line["steps"]), {})[line.get("micro_batches", 1)] = line
    counts = sorted({count for row in cells.values() for count in row})
    heads = " | ".join(f"{count}: PSNR, dB; lowest usage" for count in counts)
    rows = [f"| kind | seed | steps | {heads} | apart |", "|---|---|---|" + "---|" * (len(counts) + 1)]
    for (kind, seed, steps), row in cells.items():
        decibels, usage = [line["psnr"] for line in row.values()], [min(line["usage"]) for line in row.values()]
        found = [f"{row[c]['psnr']:.2f}; {min(row[c]['usage']):.0%}" if c in row else "–" for c in counts]
        apart = f"{max(decibels) - min(decibels):.2f} dB; {100 * (max(usage) - min(usage)):.1f} points"
        rows.append(f"| {kind} | {seed} | {steps} | {' | '.join(found)} | {apart} |")
    return "\n".join(rows)


MEDIANS = ("psnr", "ssim", "bits_per_pixel", "images_per_s", "parameters")


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time of each")
    parser.add_argument("--steps", type=int, help="so many steps instead of minutes, for a machine that is not quiet")
    parser.add_argument("--micro-batches", default="1", help="1,4,16: train with each, and compare; with --steps")
    parser.add_argument("--seeds", default="0", help="0,1,2")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon", help="of our kinds; peers have AdamW")
    parser.add_argument("--kinds", help=f"all, or some of: {'; '.join([*OURS, *PEERS])}")
    parser.add_argument("--results", type=Path, default=Path("tokenizers.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of the results and do nothing")
    parser.add_argument("--encode", action="store_true", help="measure the speed of encode and do nothing else")
    parser.add_argument("--one", nargs=3, metavar=("KIND", "SEED", "MICRO_BATCHES"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    cache = given.results.with_suffix(".images.pt")
    if given.one:
        kind, seed, parts = given.one[0], int(given.one[1]), int(given.one[2])
        line = train(kind, seed, given.minutes, given.steps, parts, given.optimizer, splits(given.data, cache))
        with open(given.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        return
    if given.encode:
        encode_speed()
        return
    if not given.table:
        kinds = given.kinds.split(",") if given.kinds else [*OURS, *PEERS]
        if unknown := [kind for kind in kinds if kind not in {*OURS, *PEERS}]:
            parser.error(f"unknown kind '{unknown[0]}'; known: {'; '.join([*OURS, *PEERS])}")
        splits(given.data, cache)
        for seed, kind, parts in itertools.product(given.seeds.split(","), kinds, given.micro_batches.split(",")):
            if any(_is_of(line, kind, seed, parts, given) for line in read(given.results)):
                continue
            command = [sys.executable, "-m", "benchmarks.tokenizers", "--one", kind, seed, parts, "--minutes"]
            command += [str(given.minutes), "--results", str(given.results), "--optimizer", given.optimizer]
            command += ["--steps", str(given.steps)] if given.steps else []
            status = subprocess.run(command).returncode
            outcome = "done" if status == 0 else f"failed ({status}), left out"
            print(f"{kind}, seed {seed}, {parts} micro-batches: {outcome}", flush=True)
    lines = [line for line in read(given.results) if given.table or line["minutes"] == given.minutes]
    if any(line.get("micro_batches", 1) > 1 for line in lines):
        print(micro_batch_table(lines), end="\n\n")
    print(table([line for line in lines if line.get("micro_batches", 1) == 1]))


def _is_of(line: dict[str, Any], kind: str, seed: str, micro_batches: str, given: argparse.Namespace) -> bool:
    optimizer = "adamw" if kind in PEERS else given.optimizer
    asked = (kind, seed, micro_batches, given.minutes, given.steps or line["steps"], optimizer)
    found = (line["kind"], str(line["seed"]), str(line.get("micro_batches", 1)), line["minutes"], line["steps"])
    return (*found, line.get("optimizer", "adamw")) == asked


if __name__ == "__main__":
    main()
