"""Optional stage, tune: the transformer learns from rewards of what it generates, on the DeepSpeed engine.

Reads transformer (its model is the start, and what the divergence is from), prepare (captions are the prompts), the
two tokenizers, and the reranker where there is one. Writes model/, which `generate` and `evaluate` then use, and
samples.png: images of the start above those of the tuned model, of the same captions and random numbers. See
pipeline/tuning/.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.cli.stage import run_stage
from pipeline.config.training import samples_per_process
from pipeline.config.tune import refuse_split_groups
from pipeline.core import distributed
from pipeline.core.initial_values import has_values, initial_values
from pipeline.data.catalog import Catalog
from pipeline.data.order import GlobalOrder, caption_in_epoch
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun
from pipeline.sampling.all_ranks import generate_on_all_ranks
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.pipeline import Pipeline
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.consolidate import finish_model
from pipeline.training.precision import precision_here
from pipeline.training.stopping import evaluation_batches, stoppable
from pipeline.training.trainer import resumes, train
from pipeline.transformer.build import build_transformer, load_transformer
from pipeline.transformer.model import Transformer
from pipeline.transformer.start import OtherWeights
from pipeline.tuning.objective import GroupRelativeObjective
from pipeline.tuning.rewards import reward_of
from pipeline.tuning.rollouts import Rollouts

_IMAGES = 16
_DTYPES = {"bf16-weights": torch.bfloat16, "fp16": torch.float16}  # of the weights; others: float32


class Workload:
    """The objective, drawn batches, rewards on the validation split (`pipeline.training.workload`)."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.config = run, run.config.tune
        self.text_tokenizer = TextTokenizer.from_pretrained(run.input("text-tokenizer"))
        self.train, self.validation = (Catalog(run.input("prepare"), split) for split in ("train", "val"))
        self.order = GlobalOrder(len(self.train), run.training_seed)
        self.validation_batches = evaluation_batches(self.config.training, len(self.validation))
        folder, device = run.input("transformer") / "model", distributed.device()
        precision = precision_here(self.config.training.precision, "deepspeed")
        self.start = load_transformer(folder, _DTYPES.get(precision), device)
        with initial_values(run.training_seed) as self.initial:
            transformer = build_transformer(self.start.layout, self.start.shape)
            self.objective = GroupRelativeObjective(transformer, self.config.kl_weight, self.config.temperature)
        if not resumes(run):
            ids = self.text_tokenizer.ids
            self.initial.replace(OtherWeights(transformer, folder, ids, ids).values)
        self._image_tokenizer = ImageTokenizer.from_pretrained(run.input("image-tokenizer") / "model").to(device)
        self._decode = self._pipeline(self.start).decode
        reranker = run.input("reranker") / "model" if run.config.reranker.enabled else None
        reward = reward_of(self.config, self.text_tokenizer, reranker)
        self.rollouts = Rollouts(
            transformer, self.start, self._decode, reward, self.config, precision, run.training_seed
        )

    def _pipeline(self, model: Transformer) -> Pipeline:
        """Made anew for each drawing: a pipeline keeps a model's packed weights, and the training writes others."""
        return Pipeline(self.text_tokenizer, model, self._image_tokenizer)

    @property
    def tokens_per_sample(self) -> int:
        """T + N."""
        return self.start.layout.length

    def batches(self, consumed: int) -> Generator[dict[str, Tensor], None, None]:
        """Images that the model draws when asked for a batch, with its weights of that step."""
        group, size = self.config.group_size, self.config.training.batch_size
        own = samples_per_process(size, distributed.world_size()) // group  # prompts
        first = consumed // group + distributed.rank() * own
        while True:
            if has_values(self.objective):
                captions = self._prompts(first, own)
                yield self.rollouts.draw(self.text_tokenizer.encode(captions), captions, first)
            else:  # before the engine gives the model its weights, somebody counts FLOPs
                yield self.rollouts.blank(own)
            first += size // group

    def _prompts(self, first: int, count: int) -> list[str]:
        """Captions of the train split in the order of its samples, another one of a sample's captions each epoch."""
        samples, epochs = self.order.locate(np.arange(first, first + count))
        counts = self.train.caption_counts(samples)
        return self.train.captions(samples, caption_in_epoch(self.run.training_seed, samples, epochs, counts))

    def data_metrics(self, samples: int) -> dict[str, float]:
        """None: prompts are drawn evenly from all sources."""
        return {}

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        """Mean reward of an image of each of the first validation captions; always from the same random numbers."""
        most = self.validation_batches * self.config.training.batch_size
        each = max(min(most, len(self.validation)) // distributed.world_size(), 1)
        rows = [(distributed.rank() * each + i) % len(self.validation) for i in range(each)]
        rewards: list[float] = []
        for some in stoppable(np.array_split(rows, -(-each // self.config.draw_at_once))):
            captions = self.validation.captions(some)
            text_BT = self.text_tokenizer.encode(captions).to(distributed.device())
            numbers = [(-1 - int(row), 0) for row in some]  # which no prompt of the training has
            codes_BN = self.rollouts.codes(text_BT, numbers)
            rewards += self.rollouts.reward(self._decode(codes_BN), captions)
        return distributed.mean({"val/reward": float(np.mean(rewards))})

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        """Images of the start and of the model as it is, of the same validation captions and random numbers."""
        captions = self.validation.captions(range(min(_IMAGES, len(self.validation))))
        draw = partial(generate_on_all_ranks, groups=[captions], seed=self.run.config.seed, in_step=in_step)
        drawn = [draw(self._pipeline(model))[0] for model in (self.start, self.objective.transformer)]
        if not distributed.is_main():
            return {}
        titles = ("Before tuning", "Tuned")
        groups = [
            Group(title, [Tile(*tile) for tile in zip(images, captions, strict=True)])
            for title, images in zip(titles, drawn, strict=True)
        ]
        return {"samples": grid(groups, columns=8, side=96)}


def main(run: StageRun) -> None:
    refuse_split_groups(run.config.tune, distributed.world_size())
    torch.manual_seed(run.training_seed)
    workload, config = Workload(run), run.config.tune
    checkpoint = train(
        run, config.training, workload, engine="deepspeed", deepspeed=config.deepspeed, initial=workload.initial
    )
    if distributed.is_main():
        finish_model(run, checkpoint)


if __name__ == "__main__":
    run_stage("tune", main)
