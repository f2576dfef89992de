"""Run by tests/training/test_sharded_images.py: a training that generates sample images with its sharded model."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.training import DeepSpeedConfig, TrainingConfig
from pipeline.config.transformer import TransformerConfig
from pipeline.core import distributed, signals
from pipeline.core.initial_values import initial_values
from pipeline.image_tokenizer.base import build
from pipeline.sampling.all_ranks import generate_on_all_ranks
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.engines import build_engine
from pipeline.training.engines.base import Start
from pipeline.training.stopping import EvaluationStopped
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective

BATCH = 4
PROMPTS = [["red joker", "Brazil", "a blue cat"], ["Brazil", "green"]]


def train(zero: int, folder: Path, with_images: bool) -> dict[str, Any]:
    """Losses of three steps, and the SHA-256 of the images that are generated after the first and the second."""
    torch.manual_seed(0)
    ema = {"kind": "ema", "codebook_size": 32, "code_width": 8}
    tokenizer = build(
        {"kind": "vqvae", "quantizer": ema, "patch_size": 2, "widths": [16, 16], "blocks": 1, "block_kernels": [3, 1]},
        16,
    ).eval()
    text = TextTokenizer.train(["red joker", "Brazil"], TextTokenizerConfig(vocab_size=270, text_length=6))
    training = TrainingConfig(steps=4, batch_size=BATCH, warmup_steps=0, learning_rate=1e-2, precision="fp32")
    config = TransformerConfig(
        layers=2, width=32, heads=2, positions="learned", caption_dropout=0, dropout=0, training=training
    )
    with initial_values(0) as initial:
        objective = JointObjective(
            Transformer(Layout.of(text.text_length, text.vocab_size, tokenizer.levels), config), config
        )
    start = Start(initial, drawn=True)
    engine = build_engine("deepspeed", objective, training, DeepSpeedConfig(zero_stage=zero), folder, start)
    losses, images = [], []
    for step in range(3):
        objective.train()
        losses.append(float(engine.accumulate(_batch(objective, step), step, 1.0, True)["loss"]))
        engine.update(1.0)
        if with_images and step < 2:
            images.append(_digest(Pipeline(text, objective.eval().transformer, tokenizer), engine))
    stopped = _stopped(Pipeline(text, objective.eval().transformer, tokenizer), engine) if with_images else None
    return {"losses": losses, "images": images, "stopped": stopped}


def _batch(objective: JointObjective, step: int) -> dict[str, torch.Tensor]:
    generator, layout = torch.Generator().manual_seed(step), objective.transformer.layout
    share, rank = BATCH // distributed.world_size(), distributed.rank()
    text = torch.randint(1, 200, (BATCH, layout.text_length), generator=generator)
    codes = torch.randint(0, 32, (BATCH, layout.image_length), generator=generator)
    return {"text": text[rank * share :][:share], "codes": codes[rank * share :][:share]}


@torch.no_grad()
def _digest(pipeline: Pipeline, engine: Any) -> str:
    with engine.gathered_outside_blocks():
        found = generate_on_all_ranks(pipeline, PROMPTS, 7, engine.in_step)
    assert [len(group) for group in found] == [3, 2]
    return hashlib.sha256(b"".join(image.tobytes() for group in found for image in group)).hexdigest()


def _stopped(pipeline: Pipeline, engine: Any) -> bool:
    """Whether every rank ends early when the last one is asked to stop, and could go on."""
    if distributed.rank() == distributed.world_size() - 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    try:
        with torch.no_grad(), engine.gathered_outside_blocks():
            generate_on_all_ranks(pipeline, PROMPTS, 7, engine.in_step)
    except EvaluationStopped:
        engine.accumulate(_batch(engine.objective.train(), 3), 3, 1.0, True)
        return all(distributed.all_gather_objects(True))
    return False


def main(zero: str, folder: str) -> None:
    signals.install()
    distributed.init()
    found = {name: train(int(zero), Path(folder), name == "with images") for name in ("alone", "with images")}
    torch.save(found, Path(folder) / f"{distributed.rank()} at {zero}.pt")
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
