"""Stage 3, image-tokenizer: learn to turn images into grids of discrete codes, and back.

Reads prepare (image shards). Trains the tokenizer of `image_tokenizer.model` through accelerate, or takes or trains
further that of `image_tokenizer.pretrained`. Writes
model/{model.safetensors,config.json} (`ImageTokenizer.from_pretrained` loads them with plain torch) and
reconstructions.png: training and validation images above what their codes decode to. See pipeline/image_tokenizer/.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.cli.stage import run_stage
from pipeline.core import distributed
from pipeline.core.atomic_io import atomic_path
from pipeline.data.augment import Augment
from pipeline.data.mixture import epoch_metrics, tell_sources
from pipeline.data.stream import ImageStream
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.image_tokenizer.evaluation import Evaluation, collapsed, evaluate, reconstruction_grid, usage_histogram
from pipeline.image_tokenizer.image_losses import add_image_losses
from pipeline.image_tokenizer.pretrained import new_tokenizer
from pipeline.image_tokenizer.start import start_from
from pipeline.orchestration.stage_run import StageRun
from pipeline.orchestration.start_model import find_start, init_from
from pipeline.training.stopping import evaluation_batches, stoppable
from pipeline.training.trainer import resumes, train

log = logging.getLogger(__name__)
_IMAGES = 32  # of each split


class Workload:
    """What the training loop needs: objective, batches, validation metrics, images."""

    tokens_per_sample = None

    def __init__(self, run: StageRun) -> None:
        self.run, self.config = run, run.config.image_tokenizer
        directory, seed = run.input("prepare"), run.training_seed
        augment = Augment(self.config.random_flip, self.config.random_crop)
        self.train = ImageStream(directory, "train", seed, shares=run.source_shares, augment=augment)
        tell_sources(self.train.order, run.config.prepare.source_names, self.config.training)
        self.validation = ImageStream(run.input("prepare"), "val", run.config.seed)
        self.validation_batches = evaluation_batches(self.config.training, len(self.validation))
        torch.manual_seed(seed)
        self.tokenizer: ImageTokenizer = new_tokenizer(self.config, self.train.image_size)
        if (source := init_from(self.config)) and not resumes(run):
            folder = find_start(source, run.name).folder
            start_from(self.tokenizer, folder).tell("image_tokenizer.init_from", folder)
        self.objective = self.tokenizer.objective()
        add_image_losses(self.objective, self.train.image_size, self.config.perceptual, self.config.adversarial)
        self.evaluation: Evaluation | None = None

    def batches(self, consumed: int) -> Generator[dict[str, Tensor], None, None]:
        return self.train.batches(consumed, self.config.training.batch_size)

    def data_metrics(self, samples: int) -> dict[str, float]:
        """The epochs of each of several sources."""
        return epoch_metrics(self.train.order, self.run.config.prepare.source_names, samples)

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        """Metrics over the first `validation_batches` of the validation split's order, on hard codes."""
        self.evaluation = evaluate(self.tokenizer, self._validation_slices())
        if distributed.is_main() and (warning := collapsed(self.evaluation, self.config.usage_floor)):
            log.warning("%s", warning)
        return {f"val/{name}": value for name, value in self.evaluation.metrics.items()}

    def _validation_slices(self) -> Iterator[dict[str, Tensor]]:
        """This rank's part of the validation batches, each image once, in the training's micro-batches."""
        size = self.config.training.batch_size
        share = size // distributed.world_size()
        batches = self.validation.batches(0, size)
        for start in stoppable(range(0, self.validation_batches * size, size)):
            # Behind the last image the stream has those of the next epoch: they are cut off.
            left = len(self.validation) - start - distributed.rank() * share
            batch = next(batches)
            if left > 0:
                micro = self.config.training.micro_batch_size or share
                yield from ({"images": part} for part in batch["images"][:left].split(micro))

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        """The same images each time: training ones, then validation ones."""
        if not distributed.is_main():
            return {}
        streams = [
            ImageStream(self.run.input("prepare"), s, self.run.config.seed, rank=0, world_size=1)
            for s in ("train", "val")
        ]
        shown = [next(stream.batches(0, _IMAGES))["images"] for stream in streams]
        found = {"reconstructions": reconstruction_grid(self.tokenizer, torch.cat(shown))}
        if self.evaluation:
            found["codebook-usage"] = usage_histogram(self.evaluation.counts)
            self.evaluation = None  # it belongs to the step that it was measured at
        return found


def main(run: StageRun) -> None:
    workload = Workload(run)
    section = run.config.image_tokenizer
    if section.pretrained and section.pretrained.train is None:
        workload.tokenizer.to(distributed.device())
        run.tracker.log(workload.evaluate(workload.objective), step=0)
    else:
        train(run, section.training, workload, engine="accelerate")
    if not distributed.is_main():
        return
    workload.tokenizer.save_pretrained(run.directory / "model")
    images = workload.sample_images(workload.objective.eval(), in_step=False)
    with atomic_path(run.directory / "reconstructions.png") as temporary:
        images["reconstructions"].save(temporary, format="png")
    for name in ("model/model.safetensors", "model/config.json", "reconstructions.png"):
        run.add_output(name, artifact=True)


if __name__ == "__main__":
    run_stage("image-tokenizer", main)
