"""A small run directory of real OpenMoji pictures, up to the stage generate, made in seconds.

The tokenizer is a real dVAE, briefly trained. The painted pictures are decoded from codes of real pictures, of which
a share is replaced at random: what a transformer that errs in that share of codes would paint.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.config import parse_config
from pipeline.data.prepare import prepare
from pipeline.data.shards import Sample, read_samples, write_shard
from pipeline.files import write_json
from pipeline.graph import PipelineConfig, stage_named
from pipeline.image_tokenizer.base import build
from pipeline.metrics.reconstruction import stacked
from pipeline.runs import RunDirectory
from pipeline.stage import StageRun
from pipeline.tracking import Tracker


def config(runs: Path, pictures: int, image_size: int, samples: int, **evaluate: Any) -> PipelineConfig:
    dvae = {"codebook_size": 256, "code_width": 32, "widths": [32, 64, 64], "blocks": 1, "reconstruction": "l1"}
    ramp = {"start": 0.0, "end": 0.0, "steps": 0}
    values: dict[str, Any] = {
        "name": "miniature",
        "runs": str(runs),
        "prepare": {
            "source": {"kind": "openmoji", "limit": pictures},
            "image_size": image_size,
            "validation_fraction": 0.1,
            "workers": 1,
        },
        "text_tokenizer": {},
        "image_tokenizer": {"model": dvae | {"kl_weight": ramp}, "training": {"steps": 200, "batch_size": 16}},
        "tokenize": {},
        "transformer": {},
        "generate": {"samples": samples},
        "evaluate": evaluate,
        "report": {},
    }
    return parse_config(PipelineConfig, values, where="miniature")


def make(config: PipelineConfig, steps: int, wrong_codes: float = 0.05) -> RunDirectory:
    """Everything that evaluate and report read."""
    run = RunDirectory(config.run_directory)
    run.open(config, "miniature.yaml")
    for name in ("prepare", "text-tokenizer", "image-tokenizer", "tokenize", "transformer", "generate"):
        run.stage(name).mkdir(parents=True)
        write_json(run.stage(name) / "timing.json", {"wall_time_s": 1.5})
    prepare(run.stage("prepare"), config.prepare, config.seed)
    samples = list(read_samples(run.stage("prepare"), "train"))
    tokenizer = _train_tokenizer(run.stage("image-tokenizer"), config, samples, steps)
    _paint(run.stage("generate"), config, tokenizer, samples, wrong_codes)
    return run


def stage_run(run: RunDirectory, config: PipelineConfig, name: str) -> StageRun:
    run.stage(name).mkdir(exist_ok=True)
    return StageRun(config, stage_named(name), run, Tracker(run.stage(name), None))


def _train_tokenizer(directory: Path, config: PipelineConfig, samples: list[Sample], steps: int) -> Any:
    torch.manual_seed(0)
    tokenizer = build(config.image_tokenizer.model, config.prepare.image_size)
    objective, tracker = tokenizer.objective(), Tracker(directory, None)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    images = (stacked([sample.image for sample in samples]) * 255).byte()
    for step in range(1, steps + 1):
        loss, metrics = objective({"images": images[torch.randint(len(images), (16,))]}, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tracker.log(
            {"learning_rate": 2e-3, "loss": loss.item()} | {name: value.item() for name, value in metrics.items()}, step
        )
    tokenizer.eval().save_pretrained(directory / "model")
    return tokenizer


@torch.no_grad()
def _paint(directory: Path, config: PipelineConfig, tokenizer: Any, samples: list[Sample], wrong_codes: float) -> None:
    chosen = samples[:: max(1, len(samples) // max(config.generate.samples, 1))][: config.generate.samples]
    pictures = _painted(tokenizer, chosen, wrong_codes)
    painted = [Sample(s.key, _png(p, directory), s.caption, {"seed": 0}) for s, p in zip(chosen, pictures, strict=True)]
    write_shard(directory / "samples" / "000000.tar", painted)
    prompts = []
    for i, sample in enumerate(islice(painted, 12)):
        (directory / "prompts").mkdir(exist_ok=True)
        (directory / "prompts" / f"{i:02d}.png").write_bytes(sample.png)
        kind = "training" if i < 8 else "new"
        prompts.append({"prompt": sample.caption, "kind": kind, "file": f"prompts/{i:02d}.png"})
    (directory / "prompts.json").write_text(json.dumps(prompts))


def _painted(tokenizer: Any, samples: list[Sample], wrong_codes: float) -> list[Image.Image]:
    codes: list[Tensor] = tokenizer.encode(stacked([sample.image for sample in samples]))
    wrong = [torch.where(torch.rand(c.shape) < wrong_codes, c[torch.randperm(len(c))], c) for c in codes]
    decoded = (tokenizer.decode(wrong).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in decoded]


def _png(picture: Image.Image, directory: Path) -> bytes:
    path = directory / "scratch.png"
    picture.save(path)
    content = path.read_bytes()
    path.unlink()
    return content
