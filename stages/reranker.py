"""Optional stage, reranker: learn which image fits a caption, to keep the best of many candidates.

Reads prepare (image shards with captions) and text-tokenizer. Trains a small CLIP through accelerate, or takes the
pretrained one at `reranker.clip`. Writes model/ (`Ranker.from_pretrained` loads it) and retrieval.json: how often an
image of the validation split finds its caption, and vice versa. See pipeline/reranker/.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pipeline.cli.stage import run_stage
from pipeline.config.reranker import refuse_single_samples
from pipeline.core import distributed
from pipeline.core.atomic_io import write_json
from pipeline.data.catalog import Catalog
from pipeline.data.mixture import epoch_metrics, tell_sources
from pipeline.data.order import caption_in_epoch
from pipeline.data.shards import Sample
from pipeline.data.stream import ImageStream
from pipeline.orchestration.stage_run import StageRun
from pipeline.reranker.model import ContrastiveObjective, TwoTowers
from pipeline.reranker.ranker import Ranker, retrieval
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.checkpoint import step_of
from pipeline.training.stopping import stop_if_asked, stoppable
from pipeline.training.trainer import train

_MEASURED = 5_000  # images of the validation split, at most
_CHECKED_EVERY = 256  # samples: whether somebody asked to stop


class Workload:
    """Captioned images for the training loop. See `pipeline.training.workload.Workload`."""

    tokens_per_sample = None

    def __init__(self, run: StageRun) -> None:
        self.run, self.config = run, run.config.reranker
        refuse_single_samples(self.config.training, distributed.world_size())
        self.text_tokenizer = TextTokenizer.from_pretrained(run.input("text-tokenizer"))
        directory, shares = run.input("prepare"), run.source_shares
        self.stream = ImageStream(directory, "train", run.training_seed, shares=shares, beside=self._captions)
        tell_sources(self.stream.order, run.config.prepare.source_names, self.config.training)
        self.catalog = Catalog(run.input("prepare"), "train")
        torch.manual_seed(run.training_seed)
        text = self.text_tokenizer
        self.towers = TwoTowers(self.config.model, self.stream.image_size, text.text_length, text.vocab_size)
        self.objective = ContrastiveObjective(self.towers)

    def batches(self, consumed: int) -> Generator[dict[str, Tensor], None, None]:
        """Images in the stream's order, each with the ids of one of its captions, another one each epoch."""
        return self.stream.batches(consumed, self.config.training.batch_size)

    def _captions(self, samples: NDArray[np.int64], epochs: NDArray[np.int64]) -> dict[str, Tensor]:
        which = caption_in_epoch(self.run.training_seed, samples, epochs, self.catalog.caption_counts(samples))
        return {"text": self.text_tokenizer.encode(self.catalog.captions(samples, which)).to(torch.int32)}

    def data_metrics(self, samples: int) -> dict[str, float]:
        """The epochs of each of several sources."""
        return epoch_metrics(self.stream.order, self.run.config.prepare.source_names, samples)

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        """Retrieval over the validation split, on every rank alike."""
        samples = stoppable(_validation(self.run), every=_CHECKED_EVERY)
        metrics = retrieval(_StoppableRanker(self.towers, self.text_tokenizer), samples, _MEASURED)
        return {f"val/{name}": value for name, value in metrics.items()}

    def ranker(self) -> Ranker:
        """The towers as they are now."""
        return Ranker(self.towers, self.text_tokenizer)

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        """None: retrieval says it all."""
        return {}


class _StoppableRanker(Ranker):
    """A ranker that looks for a stop request before each batch of images, on all ranks together."""

    def _embed(self, images: list[Image.Image]) -> Tensor:
        stop_if_asked()
        return super()._embed(images)


def main(run: StageRun) -> None:
    step = run.config.reranker.training.steps
    if run.config.reranker.clip:
        ranker = _pretrained(run, run.config.reranker.clip)
    else:
        workload = Workload(run)
        step = step_of(train(run, run.config.reranker.training, workload, engine="accelerate"))
        workload.objective.eval()
        ranker = workload.ranker()
        if distributed.is_main():
            workload.towers.save_pretrained(run.directory / "model")
            run.add_output("model/model.safetensors", artifact=True)
            run.add_output("model/config.json", artifact=True)
    if not distributed.is_main():
        return
    metrics = retrieval(ranker, _validation(run), _MEASURED)
    write_json(run.directory / "retrieval.json", metrics)
    run.add_output("retrieval.json", artifact=True)
    run.tracker.log({f"retrieval/{name}": value for name, value in metrics.items()}, step)


def _validation(run: StageRun) -> Iterator[Sample]:
    """The images of the validation split."""
    catalog = Catalog(run.input("prepare"), "val")
    return catalog.samples(range(len(catalog)))


def _pretrained(run: StageRun, clip: str) -> Ranker:
    ranker = Ranker.from_pretrained(
        Path(clip), TextTokenizer.from_pretrained(run.input("text-tokenizer")), distributed.device()
    )
    if distributed.is_main():
        write_json(run.directory / "model" / "config.json", {"kind": "clip", "path": str(Path(clip).resolve())})
        run.add_output("model/config.json", artifact=True)
    return ranker


if __name__ == "__main__":
    run_stage("reranker", main)
