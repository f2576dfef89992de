"""The figures of a run: generated pictures against real ones, and reconstructions against their originals.

Generated pictures are compared with the real pictures of the same captions ("own"), which a model that
copies comes arbitrarily close to, and with other real pictures, where it cannot come closer than real
pictures do. That last distance, own against other real pictures at the same n, is the floor.
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
from pipeline.evaluation.image_sets import Picture, decoded, pictures_at
from pipeline.evaluation.reconstruction import measure_pairs, reconstruct, stacked
from pipeline.extractors.base import FeatureSet
from pipeline.extractors.hf import CaptionJudge
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.clip_score import clip_scores
from pipeline.metrics.lpips import Lpips
from pipeline.metrics.precision_recall import nearest
from pipeline.metrics.psnr_ssim import psnr, ssim

GENERATED_OWN = "generated, real pictures of the same captions"
GENERATED_OTHER = "generated, other real pictures"
FLOOR = "real pictures, other real pictures (floor)"


class PictureSets:
    """The sets that are compared: known before any is measured, so that array tasks can share their features."""

    def __init__(self, prepare: Path, generate: Path, config: EvaluateConfig, samples: int) -> None:
        self.generated: list[Picture] = []
        if samples:
            self.generated = pictures_at(generate / "samples")[: config.samples]
        wanted = {picture.key for picture in self.generated}
        self.training = _split(prepare, "train", wanted, config.training_pictures)
        self.validation = _split(prepare, "val", wanted, config.reconstructions)
        real = {picture.key: picture for picture in (*self.validation, *self.training)}
        if strangers := [picture.key for picture in self.generated if picture.key not in real]:
            raise UserError(
                f"generate/samples: expected keys of prepared pictures, found '{strangers[0]}' and "
                f"{len(strangers) - 1} more that prepare does not hold; run generate again"
            )
        self.own = [real[picture.key] for picture in self.generated]  # of the same captions

    def all(self) -> list[tuple[str, list[Picture]]]:
        """Name and pictures of each set that is not empty."""
        named = [("training", self.training), ("generated", self.generated), ("validation", self.validation)]
        return [(name, pictures) for name, pictures in named if pictures]


class RealPictures:
    """Features of the training pictures, and which of them belong to which caption."""

    def __init__(self, sets: PictureSets, store: FeatureStore) -> None:
        self.samples, self.validation = sets.training, sets.validation
        self.training = store.features(self.samples, "features of training pictures")
        self._store = store

    def own_and_other(self, keys: list[str], seed: int) -> tuple[FeatureSet, FeatureSet]:
        """Real pictures of these keys, in their order, and as many others as there are, drawn by `seed`."""
        index = {sample.key: i for i, sample in enumerate(self.samples)}
        held_out = {sample.key: sample for sample in self.validation}
        own = self.training.take([index[key] for key in keys if key in index])
        if len(own) < len(keys):
            extra = [held_out[key] for key in keys if key not in index]
            own = own.joined(self._store.features(extra, "features of validation pictures"))
        known = set(keys)
        rest = [i for i, sample in enumerate(self.samples) if sample.key not in known]
        chosen = sorted(random.Random(seed).sample(rest, min(len(rest), len(keys))))
        return own, self.training.take(chosen)


def generated_rows(
    pictures: list[Picture], real: RealPictures, store: FeatureStore, config: EvaluateConfig, seed: int
) -> list[Row]:
    """Every figure of the generated pictures, and of real pictures beside it."""
    generated = store.features(pictures, "features of generated pictures")
    own, other = real.own_and_other([picture.key for picture in pictures], seed)
    rows = compare_sets(own, generated, GENERATED_OWN, config, seed, store.folder)
    if len(other):
        n = slice(len(other))
        rows += compare_sets(other, generated.take(n), GENERATED_OTHER, config, seed, store.folder)
        rows += compare_sets(other, own.take(n), FLOOR, config, seed, store.folder)
    rows += [*inception_rows(generated, "generated", config, seed), *inception_rows(own, "real", config, seed)]
    rows.append(distance_row(generated, "generated", real.training, seed))
    if real.validation:
        validation = store.features(real.validation, "features of validation pictures")
        rows.append(distance_row(validation, "real, never trained on", real.training, seed))
    return rows


def judged(sets: PictureSets, judge: CaptionJudge, folder: Path, seed: int) -> tuple[list[Row], list[float]]:
    """CLIP's figures of the generated and of the real pictures of the same captions; and each generated one's score.

    `folder`: of the feature cache.
    """
    store = FeatureStore(folder, judge.images)
    captions = judge.captions([picture.caption or "" for picture in sets.generated])
    generated = store.features(sets.generated, "CLIP's features of generated pictures")
    rows = caption_rows(generated, captions, "generated, their captions", seed)
    own = store.features(sets.own, "CLIP's features of real pictures")
    rows += caption_rows(own, captions, "real, their captions", seed)
    return rows, clip_scores(generated.features, captions).tolist()


def reranked(pictures: list[Picture]) -> list[float] | None:
    """How well the run's reranker found each generated picture to fit its caption; None if there was no reranker."""
    scores = [picture.about.get("score") for picture in pictures]
    found = [score for score in scores if score is not None]
    return found if found and len(found) == len(scores) else None


def tokenizer_rows(
    tokenizer: ImageTokenizer, real: RealPictures, store: FeatureStore, config: EvaluateConfig, seed: int
) -> list[Row]:
    """PSNR, SSIM, LPIPS (where its weights are) and Fréchet distance of reconstructions, by split."""
    lpips = Lpips.from_folder(config.lpips).to(next(tokenizer.parameters()).device) if config.lpips else None
    rows = []
    for split, samples in (("validation", real.validation), ("training", real.samples)):
        samples = samples[: config.reconstructions]
        if not samples:
            continue
        compares = f"{split} pictures, their reconstructions"
        figures = {"PSNR (dB)": psnr, "SSIM": ssim} | ({"LPIPS (VGG)": lpips.batched} if lpips else {})
        values, rebuilt = measure_pairs(tokenizer, samples, figures, store.extractor, config.batch_size)
        for name, found in values.items():
            network = lpips if name.startswith("LPIPS") else None
            rows.append(pair_row(name, compares, found, len(samples), seed, "lower" if network else "higher", network))
        originals = store.features(samples, f"features of {split} pictures")
        row = frechet_row(originals, rebuilt, compares, "r", config.bootstraps, seed, paired=True)
        rows.append(row)
    return rows


def nearest_training_pictures(generate: Path, real: RealPictures, store: FeatureStore) -> list[dict[str, Any]]:
    """For each picture of the prompt grid, the training picture that it comes closest to in feature space."""
    path = generate / "prompts.json"
    prompts: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    if not prompts:
        return []
    pictures = [_read(generate, prompt["file"]) for prompt in prompts]
    grid = store.extractor(pictures, len(pictures), "features of the prompt grid")
    near = _nearest(grid, real)
    return [
        {**{name: prompt[name] for name in ("prompt", "kind", "file", "score") if name in prompt}, **found}
        for prompt, found in zip(prompts, near, strict=True)
    ]


def save_samples(
    pictures: list[Picture],
    scores: list[float] | None,
    real: RealPictures,
    store: FeatureStore,
    directory: Path,
    config: EvaluateConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """Some generated pictures as files under `directory`/samples: drawn at random, and by score the best and worst."""
    if not pictures or not config.samples_shown:
        return []
    count = min(config.samples_shown, len(pictures))
    chosen = [("random", i) for i in sorted(random.Random(seed).sample(range(len(pictures)), count))]
    if scores:
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        few = max(1, min(count // 2, len(ranked) // 2))
        chosen += [("best", i) for i in ranked[:few]] + [("worst", i) for i in reversed(ranked[-few:])]
    features = store.features(pictures, "features of generated pictures").take([i for _, i in chosen])
    entries = []
    for number, ((group, i), found) in enumerate(zip(chosen, _nearest(features, real), strict=True)):
        file = f"samples/{number:02d}.png"
        with atomic_path(directory / file) as temporary:
            pictures[i].image.save(temporary, format="PNG")
        entry = {"group": group, "prompt": pictures[i].caption or pictures[i].key, "file": file, **found}
        entries.append(entry | ({"score": scores[i]} if scores else {}))
    return entries


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


def _nearest(features: FeatureSet, real: RealPictures) -> list[dict[str, Any]]:
    distances, indices = nearest(features.features, real.training.features)
    return [
        {"key": real.samples[index].key, "caption": real.samples[index].caption, "distance": distance}
        for distance, index in zip(distances.tolist(), indices.tolist(), strict=True)
    ]


def _split(prepare: Path, split: str, wanted: set[str], limit: int) -> list[Picture]:
    """The first `limit` pictures of a split, and those whose key is `wanted`."""
    index = read_index(prepare)["splits"][split]
    pictures = [picture for shard in index["shards"] for picture in pictures_at(prepare / shard["name"])]
    return [picture for i, picture in enumerate(pictures) if i < limit or picture.key in wanted]


def _read(generate: Path, file: str) -> Image.Image:
    path = generate / file
    return decoded(path.read_bytes(), str(path))
