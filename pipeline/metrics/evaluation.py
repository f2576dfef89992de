"""The figures of a run: generated pictures against real ones, and reconstructions against their originals.

Generated pictures are compared with the real pictures of the same captions ("own"), which a model that
copies comes arbitrarily close to, and with other real pictures, where it cannot come closer than real
pictures do. That last distance, own against other real pictures at the same n, is the floor.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.data.shards import Sample, read_index, read_samples
from pipeline.errors import UserError
from pipeline.files import atomic_path, read_json
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.compare import Row, compare_sets, distance_row, frechet_row, inception_row, pair_row
from pipeline.metrics.config import EvaluateConfig
from pipeline.metrics.features import Extractor, FeatureSet
from pipeline.metrics.manifold import nearest
from pipeline.metrics.pictures import decoded, named_pictures
from pipeline.metrics.reconstruction import psnr, reconstruct, ssim, stacked

GENERATED_OWN = "generated, real pictures of the same captions"
GENERATED_OTHER = "generated, other real pictures"
FLOOR = "real pictures, other real pictures (floor)"


class RealPictures:
    """The training pictures (at most `config.training_pictures`, and all that `wanted` names) and validation's."""

    def __init__(self, prepare: Path, wanted: set[str], config: EvaluateConfig, extractor: Extractor) -> None:
        self.samples = list(_samples(prepare, "train", wanted, config.training_pictures))
        self.validation = list(_samples(prepare, "val", wanted, config.reconstructions))
        training = (sample.image for sample in self.samples)
        self.training = extractor(training, len(self.samples), "features of training pictures")
        self._extractor = extractor

    def own_and_other(self, keys: list[str], seed: int) -> tuple[FeatureSet, FeatureSet]:
        """Real pictures of these keys, in their order, and as many others as there are, drawn by `seed`."""
        index = {sample.key: i for i, sample in enumerate(self.samples)}
        held_out = {sample.key: sample for sample in self.validation}
        if strangers := [key for key in keys if key not in index and key not in held_out]:
            raise UserError(
                f"generate/samples: expected keys of prepared pictures, found '{strangers[0]}' and "
                f"{len(strangers) - 1} more that prepare does not hold; run generate again"
            )
        own = self.training.take([index[key] for key in keys if key in index])
        if len(own) < len(keys):
            extra = [held_out[key].image for key in keys if key not in index]
            own = own.joined(self._extractor(extra, len(extra), "features of validation pictures"))
        rest = [i for i, sample in enumerate(self.samples) if sample.key not in set(keys)]
        chosen = sorted(random.Random(seed).sample(rest, min(len(rest), len(keys))))
        return own, self.training.take(chosen)


def generated_rows(
    samples: Path, real: RealPictures, keys: list[str], extractor: Extractor, config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every figure of the generated pictures, and of real pictures beside it."""
    pictures = (picture for _, (_, picture) in zip(keys, named_pictures(samples), strict=False))
    generated = extractor(pictures, len(keys), "features of generated pictures")
    own, other = real.own_and_other(keys, seed)
    rows = compare_sets(own, generated, GENERATED_OWN, config, seed)
    if len(other):
        n = slice(len(other))
        rows += compare_sets(other, generated.take(n), GENERATED_OTHER, config, seed)
        rows += compare_sets(other, own.take(n), FLOOR, config, seed)
    rows += [inception_row(generated, "generated", config, seed), inception_row(own, "real", config, seed)]
    rows.append(distance_row(generated, "generated", real.training))
    if real.validation:
        held_out = (sample.image for sample in real.validation)
        validation = extractor(held_out, len(real.validation), "features of validation pictures")
        rows.append(distance_row(validation, "real, never trained on", real.training))
    return rows


def tokenizer_rows(
    tokenizer: ImageTokenizer, real: RealPictures, extractor: Extractor, config: EvaluateConfig
) -> list[Row]:
    """PSNR, SSIM and Fréchet distance of reconstructions, on validation and training pictures."""
    rows = []
    for split, samples in (("validation", real.validation), ("training", real.samples)):
        samples = samples[: config.reconstructions]
        if not samples:
            continue
        pictures = [sample.image for sample in samples]
        reconstructions = reconstruct(tokenizer, pictures, config.batch_size)
        compares = f"{split} pictures, their reconstructions"
        pair = stacked(pictures), stacked(reconstructions)
        rows += [pair_row("PSNR (dB)", compares, psnr, *pair), pair_row("SSIM", compares, ssim, *pair)]
        originals = extractor(pictures, len(pictures), f"features of {split} pictures")
        rebuilt = extractor(reconstructions, len(pictures), f"features of {split} reconstructions")
        rows.append(frechet_row(originals, rebuilt, compares, prefix="r"))
    return rows


def nearest_training_pictures(generate: Path, real: RealPictures, extractor: Extractor) -> list[dict[str, Any]]:
    """For each picture of the prompt grid, the training picture that it comes closest to in feature space."""
    prompts: list[dict[str, Any]] = read_json(generate / "prompts.json")
    if not prompts:
        return []
    pictures = [_read(generate, prompt["file"]) for prompt in prompts]
    grid = extractor(pictures, len(pictures), "features of the prompt grid")
    distances, indices = nearest(grid.features, real.training.features)
    return [
        {
            **{name: prompt[name] for name in ("prompt", "kind", "file")},
            "key": real.samples[index].key,
            "caption": real.samples[index].caption,
            "distance": distance,
        }
        for prompt, distance, index in zip(prompts, distances.tolist(), indices.tolist(), strict=True)
    ]


def save_reconstructions(
    tokenizer: ImageTokenizer, real: RealPictures, directory: Path, config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Some reconstructions as files under `directory`/reconstructions, validation pictures first."""
    samples = [*real.validation, *real.samples][: config.reconstructions_shown]
    if not samples:
        return []
    pictures = [sample.image for sample in samples]
    reconstructions = reconstruct(tokenizer, pictures, config.batch_size)
    decibels = psnr(stacked(pictures), stacked(reconstructions)).tolist()
    entries = []
    for i, (sample, picture) in enumerate(zip(samples, reconstructions, strict=True)):
        file = f"reconstructions/{i:02d}.png"
        with atomic_path(directory / file) as temporary:
            picture.save(temporary, format="PNG")
        split = "val" if i < len(real.validation) else "train"
        entries.append(
            {"key": sample.key, "caption": sample.caption, "split": split, "file": file, "psnr": decibels[i]}
        )
    return entries


def _samples(prepare: Path, split: str, wanted: set[str], limit: int) -> Iterator[Sample]:
    """The first `limit` samples of a split, and those whose key is `wanted`."""
    if read_index(prepare)["splits"][split]["samples"] == 0:
        return
    missing, taken = set(wanted), 0
    for sample in read_samples(prepare, split):
        if taken < limit or sample.key in missing:
            missing.discard(sample.key)
            taken += 1
            yield sample


def _read(generate: Path, file: str) -> Image.Image:
    path = generate / file
    return decoded(path.read_bytes(), str(path))
