"""Every architecture of image tokenizers at 256 pixels, trained for the same time: memory, speed, quality.

    python -m benchmarks.large_tokenizers --data DIR --minutes 10                       enlarged images
    python -m benchmarks.large_tokenizers --photographs FOLDER --minutes 10             crops of photographs

DIR holds train/ and val/, as for benchmarks/tokenizers.py. Of the photographs every fifth is for validation, whole.
Each kind is a process of its own, whose line is appended to `--results`: a broken run resumes there.
Batches of 4, bfloat16, 1,024 codes; metrics on the validation images.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.codecs import memory_mb, random_crops
from benchmarks.contestants import NOMINAL_STEPS, Ours
from benchmarks.tokenizers import CODEBOOK, DVAE, GRADIENT, TRAINING, WIDE, fit, metrics, read
from pipeline.config.training import TrainingConfig
from pipeline.core.malloc import gives_back
from pipeline.evaluation.image_sets import named_images

SIZE, BATCH = 256, 4
# 16 pixels on a side of a code of the coarsest grid; no layer at full resolution
SHAPE: dict[str, Any] = {"patch_size": 4, "widths": [64, 128, 256], "blocks": 2, "block_kernels": [3, 1]}
SHAPE |= {"bottleneck": 1, "stem_kernel": 1, "reconstruction": "l2"}
SCALES = [1, 2, 3, 4, 6, 8, 12, 16]
MODELS: dict[str, dict[str, Any]] = {
    "vqvae": {"kind": "vqvae", **SHAPE, "quantizer": CODEBOOK},
    "vqvae2": {"kind": "vqvae2", **SHAPE, "quantizers": [CODEBOOK, CODEBOOK]},
    "multiscale": {"kind": "vqvae", **SHAPE, "quantizer": {"kind": "multiscale", "scales": SCALES, "codebook": WIDE}},
    "dvae": {"kind": "dvae", **SHAPE, **DVAE},
    "vit": {"kind": "vit", "patch_size": 16, "width": 256, "layers": 2, "heads": 4, "quantizer": GRADIENT},
    "vqgan": {"kind": "vqgan", "channels": 32, "multipliers": [1, 1, 2, 2, 4], "attention": [4], "quantizer": CODEBOOK},
    "openai-dvae": {"kind": "openai-dvae", "widths": [32, 64, 128, 256], "blocks": 1}
    | {name: value for name, value in DVAE.items() if name != "logits"},
}


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="folder with train/ and val/")
@click.option("--photographs", type=click.Path(exists=True, path_type=Path), help="folder of them")
@click.option("--minutes", default=10.0, show_default=True, help="training time of each")
@click.option(
    "--images", default=2000, show_default=True, help="of DIR to learn from, and a tenth of it to validate on"
)
@click.option("--kinds", default=",".join(MODELS), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("large_tokenizers.jsonl"), show_default=True)
@click.option("--one", hidden=True)
def main(
    data: Path | None,
    photographs: Path | None,
    minutes: float,
    images: int,
    kinds: str,
    results: Path,
    one: str | None,
) -> None:
    """Train what is not in the results yet; the table."""
    source = str(data or photographs)
    if one:
        with gives_back():  # or the training takes what decoding left, and seems to need less
            found = enlarged(data, images) if data else cropped(photographs)
        with open(results, "a") as file:
            file.write(json.dumps({"source": source, **measured(one, minutes, *found)}) + "\n")
        return
    if (data is None) == (photographs is None):
        raise click.UsageError("expected either --data or --photographs")
    for kind in kinds.split(","):
        if not any(
            (line["source"], line["kind"], line["minutes"]) == (source, kind, minutes) for line in read(results)
        ):
            command = [sys.executable, "-m", "benchmarks.large_tokenizers", *sys.argv[1:], "--one", kind]
            print(f"{kind}: {'done' if subprocess.run(command).returncode == 0 else 'failed, left out'}", flush=True)
    print(table([line for line in read(results) if (line["source"], line["minutes"]) == (source, minutes)]))


def enlarged(folder: Path, images: int) -> tuple[Tensor, Tensor]:
    """Images to learn from and to validate on, uint8 [n,3,256,256]."""
    parts = {"train": images, "val": images // 10}
    found = [[image for _, image in islice(named_images(folder / part), most)] for part, most in parts.items()]
    return stacked(found[0]), stacked(found[1])


def cropped(folder: Path | None) -> tuple[Tensor, Tensor]:
    """The same of photographs, of which no crop of one is in both."""
    assert folder
    made: tuple[list[Image.Image], list[Image.Image]] = [], []
    for number, path in enumerate(sorted(folder.iterdir())):
        made[number % 5 == 4].extend(random_crops(path, 40))
    return stacked(made[0]), stacked(made[1])


def stacked(images: list[Image.Image]) -> Tensor:
    arrays = [np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def measured(kind: str, minutes: float, train_images: Tensor, val_images: Tensor) -> dict[str, Any]:
    config = TrainingConfig(steps=NOMINAL_STEPS, optimizer="muon", **TRAINING | {"batch_size": BATCH})
    with gives_back():
        Ours(MODELS[kind], SIZE).optimizer(config)  # for the libraries that it loads
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory_mb("VmRSS")
    torch.manual_seed(0)
    made = Ours(MODELS[kind], SIZE)
    line = {"kind": kind, "minutes": minutes, **fit(made, config, 0, minutes, None, 1, train_images)}
    line |= {"mb": memory_mb("VmHWM") - before, "codes": sum(level.positions for level in made.tokenizer.levels)}
    line["parameters"] = sum(p.numel() for p in made.module.parameters())
    return line | metrics(made, val_images)


def table(lines: list[dict[str, Any]]) -> str:
    rows = ["| kind | codes | parameters | steps | images/s | memory, MB | PSNR, dB | SSIM | lowest usage |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    rows += [
        f"| `{line['kind']}` | {line['codes']:,} | {line['parameters'] / 1e6:.2f} M | {line['steps']:,} |"
        f" {line['images_per_s']:.1f} | {line['mb']:,.0f} | {line['psnr']:.2f} | {line['ssim']:.3f} |"
        f" {min(line['usage']):.0%} |"
        for line in lines
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    main()
