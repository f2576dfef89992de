"""Stage 5, transformer: learn text and image codes as one sequence, on the DeepSpeed engine.

Reads tokenize (token arrays), text-tokenizer and image-tokenizer (to generate a few prompts while training), and looks
for the prompts of `generate` in prepare's catalog before it begins.
Writes model/{model.safetensors,config.json} (`load_transformer` loads them with plain torch)
and samples.png, those images of the model's step. See pipeline/transformer/.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import islice

from PIL import Image
from torch import Tensor, nn

from pipeline.cli.stage import run_stage
from pipeline.config.training import accumulation_steps
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.initial_values import initial_values
from pipeline.data.catalog import prepared_catalog
from pipeline.data.mixture import epoch_metrics, tell_sources
from pipeline.data.sampler import TokenSampler
from pipeline.data.tokenize_shards import tokenizer_hashes
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun
from pipeline.orchestration.start_model import find_start, init_from
from pipeline.sampling.all_ranks import generate_on_all_ranks
from pipeline.sampling.checks import check_sampling_of
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.pipeline import Pipeline
from pipeline.sampling.prompts import check_against_training
from pipeline.text_tokenizer.bpe import EncodeWithDropout, TextTokenizer
from pipeline.training.consolidate import finish_model
from pipeline.training.stopping import evaluation_batches, stoppable
from pipeline.training.trainer import resumes, train
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.objective import JointObjective
from pipeline.transformer.position_plot import position_plot
from pipeline.transformer.start import OtherWeights

_IMAGES = 8
_TITLES = ("Training captions", "Validation captions")


class Workload:
    """The objective, batches, validation metrics and sample images of this training (`pipeline.training.workload`)."""

    def __init__(self, run: StageRun) -> None:
        self.run, self.config = run, run.config.transformer
        tokens = run.input("tokenize")
        self.text_tokenizer = TextTokenizer.from_pretrained(run.input("text-tokenizer"))
        encode = self._encode_caption()
        seed, shares = run.training_seed, run.source_shares
        self.train = TokenSampler(tokens, "train", seed, encode_caption=encode, draw_captions=True, shares=shares)
        tell_sources(self.train.order, run.config.prepare.source_names, self.config.training)
        self.validation = TokenSampler(tokens, "val", run.config.seed)
        for sampler in (self.train, self.validation):
            if self.config.verify == "first":
                sampler.verify()
            else:
                sampler.verify_behind()
        self.validation_batches = evaluation_batches(self.config.training, len(self.validation))
        arrays = self.train.arrays
        layout = Layout.of(arrays.text_length, arrays.text_vocab_size, arrays.levels)
        with initial_values(seed) as self.initial:
            self.objective = JointObjective(build_transformer(layout, self.config), self.config, seed)
        self._start_from_another()
        image_tokenizer = ImageTokenizer.from_pretrained(run.input("image-tokenizer") / "model")
        self.image_tokenizer = image_tokenizer.to(distributed.device())
        self._curve: Image.Image | None = None
        arrays.check_made_by(
            tokenizer_hashes(run.input("image-tokenizer") / "model", run.input("text-tokenizer")),
            (self.text_tokenizer.text_length, self.text_tokenizer.vocab_size, image_tokenizer.levels),
        )

    def verify_to_the_end(self) -> None:
        """Wait until all token arrays have been compared with their checksums.

        Raises, on every rank, UserError where one is damaged.
        """
        if self.config.verify != "first":
            self.train.verify()
            self.validation.verify()

    @property
    def tokens_per_sample(self) -> int:
        """T + N."""
        return self.objective.transformer.layout.length

    def _start_from_another(self) -> None:
        """With `init_from`: what the parameters get their first values from; a resumed training has its own."""
        if (source := init_from(self.config)) is None or resumes(self.run):
            return
        start = find_start(source, self.run.name)
        text = start.text_tokenizer
        theirs = TextTokenizer.from_pretrained(text).ids if text else None
        weights = OtherWeights(self.objective.transformer, start.folder, self.text_tokenizer.ids, theirs)
        weights.fit.tell("transformer.init_from", start.folder)
        self.initial.replace(weights.values)

    def _encode_caption(self) -> EncodeWithDropout | None:
        """How training encodes captions anew for each sample and epoch; None: the ids of the arrays."""
        dropout = self.config.bpe_dropout
        return EncodeWithDropout(self.text_tokenizer, dropout) if dropout else None

    def batches(self, consumed: int) -> Generator[dict[str, Tensor], None, None]:
        """This rank's "text" [B, T] and "codes" [B, N] of each global batch, from global sample `consumed` on."""
        for batch in self.train.batches(consumed, self.config.training.batch_size):
            self._curve = None  # it belongs to the step that it was measured at
            yield batch

    def data_metrics(self, samples: int) -> dict[str, float]:
        """The epochs of each of several sources."""
        return epoch_metrics(self.train.order, self.run.config.prepare.source_names, samples)

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        """Mean losses over the first `validation_batches` of the validation split's order, the last one filled up.

        In the training's micro-batches. The loss of each position becomes a plot, which `sample_images` returns.
        """
        size = self.config.training.batch_size
        pieces = accumulation_steps(self.config.training, distributed.world_size())
        sums: dict[str, Tensor] = {}
        count = self.validation_batches
        for batch in stoppable(islice(self.validation.batches(0, size), count)):
            for text, codes in zip(batch["text"].chunk(pieces), batch["codes"].chunk(pieces), strict=True):
                _, metrics = objective({"text": text, "codes": codes}, 0)
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value.double().cpu() / pieces
        positions = (sums.pop("loss/position") / count).tolist()
        curve = distributed.mean({f"{position:08d}": loss for position, loss in enumerate(positions)})
        if distributed.is_main():
            self._curve = position_plot([curve[name] for name in sorted(curve)], self.objective.transformer.layout)
        return distributed.mean({f"val/{name}": float(total) / count for name, total in sums.items()})

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        """A grid of images generated from a few captions of each split, beside their reconstructions, and the plot.

        All ranks generate, from the same captions each time.
        """
        assert isinstance(objective, JointObjective)
        pipeline = Pipeline(self.text_tokenizer, objective.transformer, self.image_tokenizer)
        batches = []
        for split in ("train", "val"):
            sampler = TokenSampler(self.run.input("tokenize"), split, self.run.config.seed, rank=0, world_size=1)
            batches.append(next(sampler.batches(0, _IMAGES)))
        prompts = [[self.text_tokenizer.decode(row) for row in batch["text"].cpu()] for batch in batches]
        generated = generate_on_all_ranks(pipeline, prompts, self.run.config.seed, in_step)
        if not distributed.is_main():
            return {}
        groups = []
        for title, batch, captions, images in zip(_TITLES, batches, prompts, generated, strict=True):
            groups.append(Group(title, [Tile(*tile) for tile in zip(images, captions, strict=True)]))
            originals = [Tile(image) for image in pipeline.decode(batch["codes"])]
            groups.append(Group("", originals, note="the originals, through the image tokenizer"))
        shown = {"samples": grid(groups, columns=_IMAGES, side=96)}
        curve, self._curve = self._curve, None  # it is of the evaluation just done
        return shown | ({"loss_by_position": curve} if curve else {})


def _check_prompts(run: StageRun) -> None:
    """As text-tokenizer does, which may have finished with other prompts: generate, which needs them, is hours away.

    Raises, on every rank, UserError.
    """
    if (run.directory / "checkpoints").exists():
        return
    error, catalog = None, prepared_catalog(run.input("prepare"), "train") if distributed.is_main() else None
    if catalog is not None:
        try:
            check_against_training(run.config.generate, catalog)
        except UserError as mistake:
            error = mistake
    if (told := distributed.broadcast_object(error)) is not None:
        raise told


def main(run: StageRun) -> None:
    _check_prompts(run)
    workload = Workload(run)
    check_sampling_of(run.config, workload.objective.transformer.layout)
    config = run.config.transformer
    checkpoint = train(
        run,
        config.training,
        workload,
        engine="deepspeed",
        deepspeed=config.deepspeed,
        initial=workload.initial,
    )
    workload.verify_to_the_end()
    if distributed.is_main():
        finish_model(run, checkpoint)


if __name__ == "__main__":
    run_stage("transformer", main)
