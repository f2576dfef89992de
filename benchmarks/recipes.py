"""What an image tokenizer's losses and the size of its codebook are worth, on a run of yours: a row each.

    python -m benchmarks.recipes RUN --steps 1000 -o DIR     # RUN: finished up to the stage prepare

Each recipe is the stage image-tokenizer of a run that branches off RUN into DIR, with the changes of `recipes`; what is
finished there is not trained again. Metrics of the validation split: the stage's own, and rFD, the Fréchet distance
between images and reconstructions on the features of Lite0: the network of the perceptual loss, which flatters it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline.config.pipeline import load_pipeline
from pipeline.core.image_io import to_pil
from pipeline.data.shards import read_samples
from pipeline.extractors.registry import load_extractor
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.metrics.frechet import frechet_distance

PERCEPTUAL = "image_tokenizer.perceptual={weight: %s, backbone: efficientnet-lite0, resize: 64}"
ADVERSARIAL = "image_tokenizer.adversarial={start_step: %d, ramp_steps: %d, weight: %s, learning_rate_ratio: %s}"


def recipes(steps: int) -> dict[str, list[str]]:
    """Changes of the config by recipe."""

    def adversary(start: float, weight: float = 0.5, rate: float = 1.0) -> str:
        return ADVERSARIAL % (steps * start, steps / 10, weight, rate)

    found: dict[str, list[str]] = {"as it is": []}
    found |= {f"perceptual {weight}": [PERCEPTUAL % weight] for weight in (0.1, 0.3)}
    for start in (0.1, 0.5):
        found[f"perceptual 0.1, adversary from {start:.0%}"] = [PERCEPTUAL % 0.1, adversary(start)]
    found["perceptual 0.1, weak and slow adversary from 50%"] = [PERCEPTUAL % 0.1, adversary(0.5, 0.1, 0.1)]
    found["adversary from 50%"] = [adversary(0.5)]
    found |= {
        f"{codes} codes": [f"image_tokenizer.model.quantizer.codebook_size={codes}"] for codes in (128, 2048, 8192)
    }
    return found


@click.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", default=1000, show_default=True)
@click.option("--recipe", "chosen", multiple=True, help="some of them; without it all")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("recipes"), show_default=True)
def main(run: Path, steps: int, chosen: tuple[str, ...], output: Path) -> None:
    """PSNR, SSIM, rFD and usage by recipe, and how long a step takes."""
    print("| recipe | PSNR, dB | SSIM | rFD (Lite0) | usage | bits per pixel | time of a step |")
    print("|---|---|---|---|---|---|---|")
    for name, changes in recipes(steps).items():
        if chosen and name not in chosen:
            continue
        folder = output / "".join(c if c.isalnum() else "-" for c in name)
        command = [sys.executable, "-m", "pipeline", "run", str(run), f"runs={folder}", "--only", "image-tokenizer"]
        command += [f"image_tokenizer.training.steps={steps}", "tracking.enabled=false", *changes]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = measured(folder / run.name)
        row = f"| {name} | {found['val/psnr']:.2f} | {found['val/ssim']:.3f} | {found['rfd']:.0f}"
        row += f" | {found['val/codebook_usage']:.0%} | {found['val/bits_per_pixel']:.3f}"
        print(f"{row} | {found['step_ms']:.0f} ms |", flush=True)


@torch.no_grad()
def measured(run: Path) -> dict[str, Any]:
    """The last validation of a finished training, its rFD, and the median time of its steps."""
    lines = [json.loads(line) for line in (run / "image-tokenizer" / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = [line for line in lines if "val/psnr" in line][-1]
    rates = [line["samples_per_s"] for line in lines if "samples_per_s" in line]
    batch_size = load_pipeline(run / "config.yaml").image_tokenizer.training.batch_size
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer" / "model")
    images = [sample.image for sample in read_samples(run / "prepare", "val")]
    reconstructions = []
    for some in np.array_split(np.stack([np.asarray(image) for image in images]), -(-len(images) // 64)):
        batch_B3HW = torch.from_numpy(some).permute(0, 3, 1, 2).float() / 255
        reconstructions += to_pil(tokenizer.decode(tokenizer.encode(batch_B3HW)))
    extractor = load_extractor("efficientnet-lite0", torch.device("cpu"))
    real, ours = (extractor(one).features for one in (images, reconstructions))
    return found | {"rfd": frechet_distance(real, ours), "step_ms": 1000 * batch_size / float(np.median(rates))}


if __name__ == "__main__":
    main()
