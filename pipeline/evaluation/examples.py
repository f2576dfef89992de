"""Images to look at: the prompt grid, some samples and some reconstructions, each sample with its nearest neighbour."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypedDict

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.atomic_io import read_json, write_atomic
from pipeline.core.image_io import png_bytes, to_tensor
from pipeline.core.seeds import hash64
from pipeline.data.order import subset
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.image_sets import StoredImage, decoded
from pipeline.evaluation.reconstruction import reconstruct
from pipeline.evaluation.results import NearestEntry, PromptEntry, ReconstructionEntry, SampleEntry
from pipeline.evaluation.run_evaluation import RealImages
from pipeline.extractors.base import FeatureSet
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.metrics.neighbours import nearest
from pipeline.metrics.psnr_ssim import psnr


class _Prompt(TypedDict, total=False):
    """An entry of generate/prompts.json."""

    prompt: str
    kind: str
    file: str
    score: float


def prompt_entries(generate: Path, real: RealImages, store: FeatureStore) -> list[PromptEntry]:
    """The images of the prompt grid, below the stage `generate`, each with its nearest training image."""
    path = generate / "prompts.json"
    prompts: list[_Prompt] = read_json(path) if path.is_file() else []
    if not prompts:
        return []
    images = [decoded((generate / prompt["file"]).read_bytes(), str(generate / prompt["file"])) for prompt in prompts]
    features = store.extractor(images, len(images), "features of the prompt grid")
    entries: list[PromptEntry] = []
    for prompt, found in zip(prompts, _nearest(features, real), strict=True):
        entry: PromptEntry = {"prompt": prompt["prompt"], "kind": prompt["kind"], "file": prompt["file"], **found}
        if "score" in prompt:
            entry["score"] = prompt["score"]
        entries.append(entry)
    return entries


def save_samples(
    images: list[StoredImage],
    scores: list[float] | None,
    real: RealImages,
    store: FeatureStore,
    directory: Path,
    config: EvaluateConfig,
    seed: int,
) -> list[SampleEntry]:
    """Some generated images as files under `directory`/samples: drawn at random, and by score the best and worst."""
    if not images or not config.samples_shown:
        return []
    chosen = _chosen_samples(len(images), scores, config.samples_shown, seed)
    features = store.features(images, "features of generated images").take([i for _, i in chosen])
    entries: list[SampleEntry] = []
    for number, ((group, i), found) in enumerate(zip(chosen, _nearest(features, real), strict=True)):
        file = f"samples/{number:02d}.png"
        write_atomic(directory / file, png_bytes(images[i].image))
        entry: SampleEntry = {"group": group, "prompt": images[i].caption or images[i].key, "file": file, **found}
        if scores:
            entry["score"] = scores[i]
        entries.append(entry)
    return entries


def _chosen_samples(n: int, scores: list[float] | None, shown: int, seed: int) -> list[tuple[str, int]]:
    """(group, index) of `shown` samples at random, and with scores of half as many of the best and of the worst."""
    count = min(shown, n)
    chosen = [("random", i) for i in sorted(random.Random(seed).sample(range(n), count))]
    if scores:
        ranked = sorted(range(n), key=lambda i: (-scores[i], i))
        few = max(1, min(count // 2, n // 2))
        chosen += [("best", i) for i in ranked[:few]] + [("worst", i) for i in reversed(ranked[-few:])]
    return chosen


def save_reconstructions(
    tokenizer: ImageTokenizer, real: RealImages, directory: Path, config: EvaluateConfig, seed: int
) -> list[ReconstructionEntry]:
    """Some reconstructions as files under `directory`/reconstructions, drawn at random, validation images first."""
    samples: list[StoredImage] = []
    for known in (real.validation, real.samples):
        few = subset(config.reconstructions_shown - len(samples), len(known), hash64("shown", seed))
        samples += [known[i] for i in few]
    if not samples:
        return []
    images = [sample.image for sample in samples]
    reconstructions = reconstruct(tokenizer, images, config.batch_size)
    decibels = psnr(to_tensor(images), to_tensor(reconstructions)).tolist()
    entries: list[ReconstructionEntry] = []
    for i, (sample, image) in enumerate(zip(samples, reconstructions, strict=True)):
        file = f"reconstructions/{i:02d}.png"
        write_atomic(directory / file, png_bytes(image))
        split = "val" if i < len(real.validation) else "train"
        entries.append(
            {"key": sample.key, "caption": sample.caption, "split": split, "file": file, "psnr": decibels[i]}
        )
    return entries


def _nearest(features: FeatureSet, real: RealImages) -> list[NearestEntry]:
    distances, indices = nearest(features.features, real.training.features)
    return [
        {"key": real.samples[index].key, "caption": real.samples[index].caption or "", "distance": distance}
        for distance, index in zip(distances.tolist(), indices.tolist(), strict=True)
    ]
