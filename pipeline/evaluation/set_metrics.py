"""The metrics of sets of images: one list, `METRICS`, from which every comparison takes its rows.

To add one: a function in a module of `pipeline/metrics/` that is named after the metric, and a line in `METRICS`:

    Metric("MMD", TwoSets, "lower", lambda sets: Measured(mmd(sets.real.features, sets.images.features)))

A line has the metric's name, what it needs (`OneSet`: one set of images; `TwoSets`: a set and real images to compare
it with; `CaptionedSet`: images and the embeddings of their captions), which direction is better, and the function,
which returns a `Measured`: the value, with its interval if it has one (`mean_of`, `spread_of`). None leaves the row
out. A UserError makes a row without a value, with the error as its warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.errors import UserError
from pipeline.evaluation.evaluator_npz import Statistics
from pipeline.evaluation.intervals import BOOTSTRAP, bootstrap_interval
from pipeline.evaluation.reference_stats import reference_gaussian
from pipeline.evaluation.rows import OWN, Better, Row
from pipeline.extractors.base import FeatureSet
from pipeline.metrics.authenticity import authentic
from pipeline.metrics.checks import checked
from pipeline.metrics.clip_score import clip_scores, own_caption_ranks
from pipeline.metrics.cmmd import cmmd
from pipeline.metrics.frechet import Gaussian, frechet_deviation, frechet_distance, frechet_infinity
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.neighbours import nearest
from pipeline.metrics.precision_recall import Membership, membership


@dataclass(frozen=True)
class OneSet:
    """The images to measure, and the settings that metrics look at; `n_real` is the number of real ones beside them."""

    images: FeatureSet
    config: EvaluateConfig
    seed: int

    @property
    def n_real(self) -> int:
        return 0

    def generator(self) -> torch.Generator:
        """A new generator of random numbers, from the seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class TwoSets(OneSet):
    """Images, and the real images to compare them with.

    Attributes:
        cache: the folder that keeps the statistics of real sets.
        paired: image i belongs to real image i, as a reconstruction does to its original.
    """

    real: FeatureSet
    cache: Path | None = None
    paired: bool = False

    @property
    def n_real(self) -> int:
        return len(self.real)

    @property
    def n(self) -> int:
        """Images in the smaller set."""
        return min(len(self.real), len(self.images))

    @property
    def dimensions(self) -> int:
        """Dimensions of a feature vector."""
        return self.real.features.shape[1]

    @cached_property
    def reference(self) -> Gaussian:
        """The Gaussian of the real images' features."""
        return reference_gaussian(self.real.features, self.cache)

    @cached_property
    def membership(self) -> Membership:
        """Which images lie in the other set's manifold."""
        return membership(self.real.features, self.images.features, self.config.neighbours)

    @cached_property
    def membership_at_3(self) -> Membership:
        """`membership` with the k of guided-diffusion's evaluator, 3."""
        return membership(self.real.features, self.images.features, 3)


@dataclass(frozen=True)
class AgainstStatistics(OneSet):
    """Images, and the statistics of a reference file to compare them with."""

    reference: Statistics


@dataclass(frozen=True)
class CaptionedSet(OneSet):
    """Images, and the embedding `[n, d]` of each one's caption in the space of the images' features."""

    captions: Tensor

    @cached_property
    def ranks(self) -> Tensor:
        """How many captions are nearer to each image than its own, `[n]`."""
        return own_caption_ranks(self.images.features, self.captions)


@dataclass(frozen=True)
class Measured:
    """What a metric's function found."""

    value: float
    interval: tuple[float, float] | None = None
    interval_of: str | None = None
    warning: str | None = None


Input = TypeVar("Input", bound=OneSet)


@dataclass(frozen=True)
class Metric(Generic[Input]):
    """One metric: a line of `METRICS`.

    Attributes:
        name: `{fd}` in it becomes FID on the Inception network that published FID is measured with, FD on any other
            network, `{cmmd}` CMMD on CLIP, MMD on any other network, and `{k}` the config's number of neighbours.
        needs: the kind of input that `measure` takes.
        protocols: by extractor, or extractor and k, whose published procedure it follows there.
    """

    name: str
    needs: type[Input]
    better: Better
    measure: Callable[[Input], Measured | None]
    protocols: Mapping[str, str] = field(default_factory=dict)


def mean_of(values: Tensor, seed: int, interval_of: str = BOOTSTRAP) -> Measured:
    """The mean of one value per image, `[n]`, with its bootstrap interval."""
    return Measured(values.mean().item(), bootstrap_interval(values, seed), interval_of)


def spread_of(found: tuple[float, float], repeats: str) -> Measured:
    """A mean and the standard deviation over `repeats` as its interval."""
    mean, deviation = found
    return Measured(mean, (mean - deviation, mean + deviation), f"± 1 standard deviation over {repeats}")


def _frechet(sets: TwoSets) -> Measured:
    warning = _too_few(sets.n, sets.dimensions)
    value = frechet_distance(sets.real.features, sets.images.features, sets.reference)
    bootstraps = sets.config.bootstraps
    if bootstraps < 2:
        return Measured(value, warning=warning)
    deviation = frechet_deviation(
        sets.real.features, sets.images.features, sets.generator(), bootstraps, paired=sets.paired
    )
    reach = 1.96 * deviation
    resampled = f"{bootstraps} bootstraps{' of pairs' if sets.paired else ''}"
    return Measured(
        value=value,
        interval=(max(value - reach, 0.0), value + reach),
        interval_of=f"95 % confidence at this n, normal, deviation of {resampled}",
        warning=warning,
    )


def _too_few(n: int, dimensions: int) -> str | None:
    few = f"{n} samples for {dimensions} feature dimensions: biased upwards, compare at equal n only"
    return few if n < dimensions else None


def _spatial_frechet(sets: TwoSets) -> Measured | None:
    real, generated = sets.real.spatial, sets.images.spatial
    if real is None or generated is None:  # only Inception has them
        return None
    value = frechet_distance(real, generated, reference_gaussian(real, sets.cache))
    return Measured(value, warning=_too_few(sets.n, real.shape[1]))


def _to_reference(values: Tensor | None, reference: Gaussian | None, where: str) -> Measured | None:
    """The Fréchet distance of features `[n, d]` to a reference file's Gaussian."""
    if values is None or reference is None:
        return None
    checked(values, "generated", at_least=2, reason="a covariance")
    n, dimensions = values.shape
    if dimensions != len(reference.mean):
        raise UserError(f"{where}: expected statistics of {dimensions} dimensions, found {len(reference.mean)}")
    return Measured(reference.distance(Gaussian.of(values)), warning=_too_few(n, dimensions))


def _share_at_3(which: Literal["precision", "recall"]) -> Callable[[TwoSets], Measured | None]:
    """Precision or recall at the k of published tables: on the network of FID, where the config has another k."""

    def measure(sets: TwoSets) -> Measured | None:
        if sets.images.info.name != "inception-v3" or sets.config.neighbours == 3:
            return None
        return _share(sets, getattr(sets.membership_at_3, which))

    return measure


def _authenticity(sets: TwoSets) -> Measured:
    found = authentic(sets.real.features, sets.images.features)
    return mean_of(100 * found.double(), sets.seed, f"{BOOTSTRAP} of its samples, the other set held fixed")


def _frechet_infinity(sets: TwoSets) -> Measured:
    value = frechet_infinity(sets.real.features, sets.images.features, sets.generator(), reference=sets.reference)
    n, dimensions = sets.n, sets.dimensions
    few = f"{n} samples for {dimensions} feature dimensions: too few for a straight line"
    return Measured(value, warning=few if n < dimensions else None)


def _kid(sets: TwoSets) -> Measured:
    subsets, subset_size = sets.config.kid_subsets, min(sets.config.kid_subset_size, sets.n // 2)
    found = kernel_distance(sets.real.features, sets.images.features, subsets, subset_size, sets.generator())
    return spread_of(found, f"{subsets} subsets of {subset_size}")


def _share(sets: TwoSets, inside: Tensor) -> Measured:
    """The mean of one of the four values of `Membership`."""
    return mean_of(inside, sets.seed, f"{BOOTSTRAP} of its samples, the other set held fixed")


def _precision(sets: TwoSets) -> Measured:
    return _share(sets, sets.membership.precision)


def _recall(sets: TwoSets) -> Measured:
    return _share(sets, sets.membership.recall)


def _inception_score(one: OneSet) -> Measured | None:
    if one.images.logits is None:  # the network is no classifier
        return None
    splits = one.config.inception_splits
    return spread_of(inception_score(one.images.logits, splits, one.generator()), f"{splits} splits")


def _retrieval(k: int) -> Callable[[CaptionedSet], Measured | None]:
    def measure(one: CaptionedSet) -> Measured | None:
        if k >= len(one.captions):  # every caption is among the first k
            return None
        return mean_of((one.ranks < k).double(), one.seed)

    return measure


def _median_nearest_distance(sets: TwoSets) -> Measured:
    distances, _ = nearest(sets.images.features, sets.real.features)
    return Measured(
        value=distances.median().item(),
        interval=bootstrap_interval(distances, sets.seed, torch.median),
        interval_of=BOOTSTRAP,
        warning=None if len(sets.images) >= 10 else f"only {len(sets.images)} images",
    )


_EVALUATOR = {"inception-v3": "guided-diffusion"}
_EVALUATOR_AT_3 = {"inception-v3 k=3": "guided-diffusion"}
_DGM_EVAL = {"dinov2": "dgm-eval"}

FRECHET = Metric("{fd}", TwoSets, "lower", _frechet, _EVALUATOR | _DGM_EVAL)
# Of reconstructions, and of such from wrong codes.
RECONSTRUCTED = replace(FRECHET, name="r{fd}")
PERTURBED = replace(FRECHET, name="p{fd}", protocols={"inception-v3": "pFID"})

METRICS: tuple[Metric[Any], ...] = (
    FRECHET,
    Metric("{fd}∞", TwoSets, "lower", _frechet_infinity),
    Metric("sFID", TwoSets, "lower", _spatial_frechet, _EVALUATOR),
    Metric("KID", TwoSets, "lower", _kid),
    Metric(
        "{cmmd}",
        TwoSets,
        "lower",
        lambda sets: Measured(cmmd(sets.real.features, sets.images.features)),
        {"clip": "CMMD"},
    ),
    Metric("precision k={k}", TwoSets, "higher", _precision, _EVALUATOR_AT_3),
    Metric("recall k={k}", TwoSets, "higher", _recall, _EVALUATOR_AT_3),
    Metric("precision k=3", TwoSets, "higher", _share_at_3("precision"), _EVALUATOR),
    Metric("recall k=3", TwoSets, "higher", _share_at_3("recall"), _EVALUATOR),
    Metric("density k={k}", TwoSets, "higher", lambda sets: _share(sets, sets.membership.density)),
    Metric("coverage k={k}", TwoSets, "higher", lambda sets: _share(sets, sets.membership.coverage)),
    Metric(
        "{fd}",
        AgainstStatistics,
        "lower",
        lambda one: _to_reference(one.images.features, one.reference.features, one.reference.where),
        _EVALUATOR,
    ),
    Metric(
        "sFID",
        AgainstStatistics,
        "lower",
        lambda one: _to_reference(one.images.spatial, one.reference.spatial, one.reference.where),
        _EVALUATOR,
    ),
    Metric("IS", OneSet, "higher", _inception_score),
    Metric(
        "CLIP score",
        CaptionedSet,
        "higher",
        lambda one: mean_of(clip_scores(one.images.features, one.captions), one.seed),
    ),
    Metric("R@1", CaptionedSet, "higher", _retrieval(1)),
    Metric("R@5", CaptionedSet, "higher", _retrieval(5)),
    Metric("R@10", CaptionedSet, "higher", _retrieval(10)),
)

# Not in the list, since it compares with all training images, not at equal n. Near 0 the images are copies.
NEAREST_TRAINING_IMAGE = Metric(
    "median distance to the nearest training image", TwoSets, "higher", _median_nearest_distance
)
AUTHENTICITY = Metric("AuthPct, beside the training images", TwoSets, "higher", _authenticity, _DGM_EVAL)


def rows_of(measured: OneSet, compares: str) -> list[Row]:
    """A row for each metric of the list that needs just this kind of input."""
    rows = [row_of(metric, measured, compares) for metric in METRICS if metric.needs is type(measured)]
    return [row for row in rows if row is not None]


def row_of(metric: Metric[Input], measured: Input, compares: str) -> Row | None:
    """The row of one metric, named after the extractor as well; None where the metric leaves it out."""
    info = measured.images.info
    try:
        found = metric.measure(measured)
        if found is None:
            return None
        value, interval, interval_of, warning = found.value, found.interval, found.interval_of, found.warning
    except UserError as error:
        value, interval, interval_of, warning = None, None, None, str(error)
    protocols, k = metric.protocols, measured.config.neighbours
    name = metric.name.format(
        fd="FID" if info.name == "inception-v3" else "FD",
        cmmd="CMMD" if info.name == "clip" else "MMD",
        k=k,
    )
    return Row(
        metric=f"{name} ({info.label})",
        compares=compares,
        value=value,
        better=metric.better,
        n_real=measured.n_real,
        n_generated=len(measured.images),
        extractor=info.name,
        weights_sha256=info.weights_sha256,
        resize=info.resize,
        interval=interval,
        interval_of=interval_of,
        warning=warning,
        protocol=protocols.get(info.name) or protocols.get(f"{info.name} k={k}", OWN),
    )
