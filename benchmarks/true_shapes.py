"""Configs for larger machines at their true shapes, with a tiny width: does every stage before `generate` run?

    python -m benchmarks.true_shapes [imagenet] [cc12m] [--steps 20] [--processes 1]

Images of the config's size, its sequence length, vocabularies, layers, losses, optimizer and precision, as `smalti run`
runs them, on made data: blurred noise under made classes, or under captions of made words. Smaller than in the config
are widths, and the batch, an image a process; the discriminator begins halfway, and LPIPS is a VGG-16 of its true size
with random weights.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from pipeline.config.pipeline import load_pipeline
from pipeline.core.atomic_io import read_json
from pipeline.data.prepare_part import safe_key
from pipeline.data.splits import split_of
from pipeline.extractors.lpips_vgg16 import BACKBONE, HEADS, Lpips

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("prepare", "text-tokenizer", "image-tokenizer", "tokenize", "transformer")
_CLASSES = 1000
_WORDS, _CAPTIONS, _LONG = 12_000, 300, 100  # words in all, captions, words in each
_VALIDATION = 0.02


@click.command()
@click.argument("names", nargs=-1)
@click.option("--steps", default=20, show_default=True, help="of both trainings")
@click.option("--processes", default=1, show_default=True)
def main(names: Sequence[str], steps: int, processes: int) -> None:
    """Run these configs, imagenet and cc12m if none is named."""
    for name in names or ("imagenet", "cc12m"):
        with tempfile.TemporaryDirectory(prefix="true-shapes-") as folder:
            _run(name, Path(folder), steps, processes)


def _run(name: str, folder: Path, steps: int, processes: int) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    source = _folders_of_classes(path, folder) if name == "imagenet" else _captioned_tars(folder)
    tiny = [
        "image_tokenizer.model.channels=32",
        "image_tokenizer.adversarial.width=8",
        f"image_tokenizer.adversarial.start_step={steps // 2}",
        f"image_tokenizer.perceptual.weights={_random_lpips(folder / 'lpips')}",
        "transformer.width=64",
        f"prepare.validation_fraction={_VALIDATION}",
        "generate.samples=16",  # the made data has few captions
        *(f"{stage}.training.{key}" for stage in ("image_tokenizer", "transformer")
          for key in (f"steps={steps}", f"batch_size={processes}", "warmup_steps=2", "log_every=1")),
    ]  # fmt: skip
    options = [str(path), f"runs={folder}", f"processes={processes}", "tracking.enabled=false"]
    for stage in STAGES:
        command = [sys.executable, "-m", "pipeline", "run", *options, f"prepare.source={source}", *tiny]
        subprocess.run([*command, "--only", stage], check=True, cwd=ROOT)
    _tell(name, folder / name, steps, processes)


def _tell(name: str, run: Path, steps: int, processes: int) -> None:
    """What the models' shapes are, and what a step took; an error where a training has not made all of its steps."""
    lines = {}
    for stage in ("image-tokenizer", "transformer"):
        found = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        lines[stage] = [line for line in found if "loss" in line]
        assert lines[stage][-1]["step"] == steps, f"{stage}: expected {steps} steps, found {lines[stage][-1]['step']}"
    layout = read_json(run / "transformer" / "model" / "config.json")
    print(f"\n{name}, {processes} processes: {json.dumps(layout)}")
    for stage, found in lines.items():
        first, last = found[0], found[-1]
        seconds = (last["time"] - first["time"]) / (steps - 1)
        print(
            f"  {stage}: {steps} steps of {processes} images, {seconds:.2f} s each, loss {first['loss']:.4g} to", end=""
        )
        print(f" {last['loss']:.4g}, {sum(line['nonfinite_steps'] for line in found):.0f} not finite", flush=True)


def _folders_of_classes(config: Path, folder: Path) -> str:
    """An image of each class, and one more where the first is for validation; the config's prompts are among them."""
    names = list(load_pipeline(config).generate.training_prompts)
    names += [f"n9{number:07d}" for number in range(_CLASSES - len(names))]
    for number, name in enumerate(names):
        (folder / "images" / name).mkdir(parents=True)
        in_validation = split_of(safe_key(f"{name}/0"), None, _VALIDATION) == "val"
        for one in range(1 + in_validation):
            (folder / "images" / name / f"{one}.JPEG").write_bytes(_jpeg(2 * number + one))
    return json.dumps({"kind": "folder", "path": str(folder / "images"), "captions": "folders"})


def _captioned_tars(folder: Path) -> str:
    """Two tars as img2dataset writes them."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnoprstuvwy"), 8)) for _ in range(_WORDS)]
    for shard, numbers in enumerate(np.array_split(np.arange(_CAPTIONS), 2)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers:
                caption = " ".join(random.choice(words, _LONG))
                about = json.dumps({"caption": caption, "key": f"{number:09d}", "status": "success"})
                for ending, content in (
                    ("jpg", _jpeg(int(number))),
                    ("txt", caption.encode()),
                    ("json", about.encode()),
                ):
                    info = tarfile.TarInfo(f"{number:09d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return json.dumps({"kind": "webdataset", "urls": f"{folder}/{{00000..00001}}.tar"})


def _jpeg(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
    found = io.BytesIO()
    Image.fromarray(coarse).resize((350, 300), Image.Resampling.BICUBIC).save(found, "JPEG")
    return found.getvalue()


def _random_lpips(folder: Path) -> Path:
    """Files of LPIPS's shapes."""
    torch.manual_seed(0)
    network = Lpips()
    folder.mkdir()
    torch.save({f"features.{name}": value for name, value in network.features.state_dict().items()}, folder / BACKBONE)
    heads = {f"lin{i}.model.1.weight": torch.full_like(head, 1 / head.numel()) for i, head in enumerate(network.heads)}
    torch.save(heads, folder / HEADS)
    return folder


if __name__ == "__main__":
    main()
