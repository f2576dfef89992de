"""The metrics of a run: generated images against real ones, and reconstructions against their originals.

Generated images are compared with the real images of the same captions ("own"), which a model that
copies comes arbitrarily close to, and with other real images, where it cannot come closer than real
images do. That last distance, own against other real images at the same n, is the floor.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.atomic_io import atomic_path, read_json
from pipeline.core.errors import UserError
from pipeline.data.shards import read_index
from pipeline.evaluation.comparison import (
    Row,
    caption_rows,
    compare_sets,
    distance_row,
    frechet_row,
    inception_rows,
    pair_row,
)
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.image_sets import StoredImage, decoded, images_at
from pipeline.evaluation.reconstruction import measure_pairs, reconstruct, stacked
from pipeline.extractors.base import FeatureSet
from pipeline.extractors.clip_scorer import ClipScorer
from pipeline.extractors.lpips_vgg16 import Lpips
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.clip_score import clip_scores
from pipeline.metrics.neighbours import nearest
from pipeline.metrics.psnr_ssim import psnr, ssim

GENERATED_OWN = "generated, real images of the same captions"
GENERATED_OTHER = "generated, other real images"
FLOOR = "real images, other real images (floor)"


class ImageSets:
    """The sets that are compared: known before any is measured, so that array tasks can share their features."""

    def __init__(self, prepare: Path, generate: Path, config: EvaluateConfig, samples: int) -> None:
        self.generated: list[StoredImage] = []
        if samples:
            self.generated = images_at(generate / "samples")[: config.samples]
        wanted = {image.key for image in self.generated}
        self.training = _split(prepare, "train", wanted, config.training_images)
        self.validation = _split(prepare, "val", wanted, config.reconstructions)
        real = {image.key: image for image in (*self.validation, *self.training)}
        if strangers := [image.key for image in self.generated if image.key not in real]:
            raise UserError(
                f"generate/samples: expected keys of prepared images, found '{strangers[0]}' and "
                f"{len(strangers) - 1} more that prepare does not hold; run generate again"
            )
        self.own = [real[image.key] for image in self.generated]  # of the same captions

    def all(self) -> list[tuple[str, list[StoredImage]]]:
        """Name and images of each set that is not empty."""
        named = [("training", self.training), ("generated", self.generated), ("validation", self.validation)]
        return [(name, images) for name, images in named if images]


class RealImages:
    """Features of the training images, and which of them belong to which caption."""

    def __init__(self, sets: ImageSets, store: FeatureStore) -> None:
        self.samples, self.validation = sets.training, sets.validation
        self.training = store.features(self.samples, "features of training images")
        self._store = store

    def own_and_other(self, keys: list[str], seed: int) -> tuple[FeatureSet, FeatureSet]:
        """Real images of these keys, in their order, and as many others as there are, drawn by `seed`."""
        index = {sample.key: i for i, sample in enumerate(self.samples)}
        held_out = {sample.key: sample for sample in self.validation}
        own = self.training.take([index[key] for key in keys if key in index])
        if len(own) < len(keys):
            extra = [held_out[key] for key in keys if key not in index]
            own = own.joined(self._store.features(extra, "features of validation images"))
        known = set(keys)
        rest = [i for i, sample in enumerate(self.samples) if sample.key not in known]
        chosen = sorted(random.Random(seed).sample(rest, min(len(rest), len(keys))))
        return own, self.training.take(chosen)


def generated_rows(
    images: list[StoredImage], real: RealImages, store: FeatureStore, config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every metric of the generated images, and of real images beside it."""
    generated = store.features(images, "features of generated images")
    own, other = real.own_and_other([image.key for image in images], seed)
    rows = compare_sets(own, generated, GENERATED_OWN, config, seed, store.folder)
    if len(other):
        n = slice(len(other))
        rows += compare_sets(other, generated.take(n), GENERATED_OTHER, config, seed, store.folder)
        rows += compare_sets(other, own.take(n), FLOOR, config, seed, store.folder)
    rows += [*inception_rows(generated, "generated", config, seed), *inception_rows(own, "real", config, seed)]
    rows.append(distance_row(generated, "generated", real.training, seed))
    if real.validation:
        validation = store.features(real.validation, "features of validation images")
        rows.append(distance_row(validation, "real, never trained on", real.training, seed))
    return rows


def judged(sets: ImageSets, judge: ClipScorer, folder: Path, seed: int) -> tuple[list[Row], list[float]]:
    """CLIP's metrics of the generated and of the real images of the same captions; and each generated one's score.

    `folder`: of the feature cache.
    """
    store = FeatureStore(folder, judge.images)
    captions = judge.captions([image.caption or "" for image in sets.generated])
    generated = store.features(sets.generated, "CLIP's features of generated images")
    rows = caption_rows(generated, captions, "generated, their captions", seed)
    own = store.features(sets.own, "CLIP's features of real images")
    rows += caption_rows(own, captions, "real, their captions", seed)
    return rows, clip_scores(generated.features, captions).tolist()


def reranked(images: list[StoredImage]) -> list[float] | None:
    """How well the run's reranker found each generated image to fit its caption; None if there was no reranker."""
    scores = [image.about.get("score") for image in images]
    found = [score for score in scores if score is not None]
    return found if found and len(found) == len(scores) else None


def tokenizer_rows(
    tokenizer: ImageTokenizer, real: RealImages, store: FeatureStore, config: EvaluateConfig, seed: int
) -> list[Row]:
    """PSNR, SSIM, LPIPS (where its weights are) and Fréchet distance of reconstructions, by split."""
    lpips = Lpips.from_folder(config.lpips).to(next(tokenizer.parameters()).device) if config.lpips else None
    rows = []
    for split, samples in (("validation", real.validation), ("training", real.samples)):
        samples = samples[: config.reconstructions]
        if not samples:
            continue
        compares = f"{split} images, their reconstructions"
        metrics = {"PSNR (dB)": psnr, "SSIM": ssim} | ({"LPIPS (VGG)": lpips.batched} if lpips else {})
        values, rebuilt = measure_pairs(tokenizer, samples, metrics, store.extractor, config.batch_size)
        for name, found in values.items():
            network = lpips if name.startswith("LPIPS") else None
            rows.append(pair_row(name, compares, found, len(samples), seed, "lower" if network else "higher", network))
        originals = store.features(samples, f"features of {split} images")
        row = frechet_row(originals, rebuilt, compares, "r", config.bootstraps, seed, paired=True)
        rows.append(row)
    return rows


def nearest_training_images(generate: Path, real: RealImages, store: FeatureStore) -> list[dict[str, Any]]:
    """For each image of the prompt grid, the training image that it comes closest to in feature space."""
    path = generate / "prompts.json"
    prompts: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    if not prompts:
        return []
    images = [_read(generate, prompt["file"]) for prompt in prompts]
    grid = store.extractor(images, len(images), "features of the prompt grid")
    near = _nearest(grid, real)
    return [
        {**{name: prompt[name] for name in ("prompt", "kind", "file", "score") if name in prompt}, **found}
        for prompt, found in zip(prompts, near, strict=True)
    ]


def save_samples(
    images: list[StoredImage],
    scores: list[float] | None,
    real: RealImages,
    store: FeatureStore,
    directory: Path,
    config: EvaluateConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """Some generated images as files under `directory`/samples: drawn at random, and by score the best and worst."""
    if not images or not config.samples_shown:
        return []
    count = min(config.samples_shown, len(images))
    chosen = [("random", i) for i in sorted(random.Random(seed).sample(range(len(images)), count))]
    if scores:
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        few = max(1, min(count // 2, len(ranked) // 2))
        chosen += [("best", i) for i in ranked[:few]] + [("worst", i) for i in reversed(ranked[-few:])]
    features = store.features(images, "features of generated images").take([i for _, i in chosen])
    entries = []
    for number, ((group, i), found) in enumerate(zip(chosen, _nearest(features, real), strict=True)):
        file = f"samples/{number:02d}.png"
        with atomic_path(directory / file) as temporary:
            images[i].image.save(temporary, format="PNG")
        entry = {"group": group, "prompt": images[i].caption or images[i].key, "file": file, **found}
        entries.append(entry | ({"score": scores[i]} if scores else {}))
    return entries


def save_reconstructions(
    tokenizer: ImageTokenizer, real: RealImages, directory: Path, config: EvaluateConfig
) -> list[dict[str, Any]]:
    """Some reconstructions as files under `directory`/reconstructions, validation images first."""
    samples = [*real.validation, *real.samples][: config.reconstructions_shown]
    if not samples:
        return []
    images = [sample.image for sample in samples]
    reconstructions = reconstruct(tokenizer, images, config.batch_size)
    decibels = psnr(stacked(images), stacked(reconstructions)).tolist()
    entries = []
    for i, (sample, image) in enumerate(zip(samples, reconstructions, strict=True)):
        file = f"reconstructions/{i:02d}.png"
        with atomic_path(directory / file) as temporary:
            image.save(temporary, format="PNG")
        split = "val" if i < len(real.validation) else "train"
        entries.append(
            {"key": sample.key, "caption": sample.caption, "split": split, "file": file, "psnr": decibels[i]}
        )
    return entries


def _nearest(features: FeatureSet, real: RealImages) -> list[dict[str, Any]]:
    distances, indices = nearest(features.features, real.training.features)
    return [
        {"key": real.samples[index].key, "caption": real.samples[index].caption, "distance": distance}
        for distance, index in zip(distances.tolist(), indices.tolist(), strict=True)
    ]


def _split(prepare: Path, split: str, wanted: set[str], limit: int) -> list[StoredImage]:
    """The first `limit` images of a split, and those whose key is `wanted`."""
    index = read_index(prepare)["splits"][split]
    images = [image for shard in index["shards"] for image in images_at(prepare / shard["name"])]
    return [image for i, image in enumerate(images) if i < limit or image.key in wanted]


def _read(generate: Path, file: str) -> Image.Image:
    path = generate / file
    return decoded(path.read_bytes(), str(path))
