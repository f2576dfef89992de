"""The list of metrics: a line in it is all that a comparison needs to know of a metric."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pipeline.config.evaluate import EvaluateConfig
from pipeline.core.errors import UserError
from pipeline.evaluation import set_metrics
from pipeline.evaluation.comparison import caption_rows, compare_features, compare_sets
from pipeline.evaluation.rows import Row, warnings
from pipeline.evaluation.set_metrics import METRICS, Measured, Metric, TwoSets, mean_of
from pipeline.extractors.base import ExtractorInfo, FeatureSet
from pipeline.metrics.checks import BLOCK
from tests.largest_tensor import LargestTensor

INFO = ExtractorInfo("my-network", "Mine", "0" * 64, "64 × 64")
CONFIG = EvaluateConfig(neighbours=2, kid_subsets=2, bootstraps=0, inception_splits=2)


def features(n: int, seed: int, logits: bool = True) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(n, 10, generator=generator) if logits else None
    return FeatureSet(torch.randn(n, 4, generator=generator), classes, INFO)


def test_a_line_in_the_list_is_a_row_of_every_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def distance(sets: TwoSets) -> Measured:
        return mean_of((sets.images.features - sets.real.features).norm(dim=1).double(), sets.seed)

    monkeypatch.setattr(set_metrics, "METRICS", (*METRICS, Metric("mean distance k={k}", TwoSets, "lower", distance)))
    rows = {row.metric: row for row in compare_features(features(30, 0), features(24, 1), CONFIG, seed=0)}
    added = rows["mean distance k=2 (Mine)"]
    assert (added.better, added.n_real, added.n_generated, added.extractor) == ("lower", 24, 24, "my-network")
    assert added.value is not None
    assert added.interval is not None
    assert added.interval[0] < added.value < added.interval[1]


def test_what_cannot_be_measured_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sets: TwoSets) -> Measured:
        raise UserError("too few images")

    monkeypatch.setattr(set_metrics, "METRICS", (Metric("MMD", TwoSets, "lower", fails),))
    (row,) = compare_features(features(8, 0), features(8, 1), CONFIG, seed=0)
    assert (row.metric, row.value, row.interval, row.warning) == ("MMD (Mine)", None, None, "too few images")
    assert warnings([row, row]) == ["MMD (Mine): too few images"]


def test_each_comparison_takes_the_metrics_that_its_input_is_enough_for() -> None:
    sets = ["FD", "FD∞", "KID", "MMD", "precision k=2", "recall k=2", "density k=2", "coverage k=2"]
    rows = compare_features(features(24, 0), features(24, 1), CONFIG, seed=0)
    assert [row.metric for row in rows] == [f"{name} (Mine)" for name in (*sets, "IS")]
    without_classes = compare_features(features(24, 0, logits=False), features(24, 1, logits=False), CONFIG, seed=0)
    assert [row.metric for row in without_classes] == [f"{name} (Mine)" for name in sets]
    captioned = caption_rows(features(8, 0), torch.randn(8, 4), "", CONFIG, seed=0)
    assert [row.metric for row in captioned] == ["CLIP score (Mine)", "R@1 (Mine)", "R@5 (Mine)"]  # 10 of 8 are all


def test_retrieval_of_many_captions_goes_in_blocks_and_ranks_as_the_whole_matrix_does() -> None:
    images, captions = features(BLOCK + 100, 0, logits=False), features(BLOCK + 100, 1).features
    with LargestTensor() as largest:
        rows = caption_rows(images, captions, "", CONFIG, seed=0)
    assert largest.elements <= BLOCK**2
    similarity = nn.functional.normalize(images.features.double()) @ nn.functional.normalize(captions.double()).T
    ranks = (similarity > similarity.diagonal()[:, None] + 1e-9).sum(dim=1)
    found = {row.metric: row.value for row in rows}
    assert [found[f"R@{k} (Mine)"] for k in (1, 5, 10)] == [(ranks < k).double().mean().item() for k in (1, 5, 10)]


def test_a_larger_set_in_the_order_of_its_classes_is_compared_on_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(20, 8, generator=generator)

    def drawn(classes: torch.Tensor) -> FeatureSet:
        noise = torch.randn(len(classes), 8, generator=generator)
        return FeatureSet(centres[classes] + noise, None, INFO)

    classes = torch.randint(20, (1500,), generator=generator)
    real, fake = drawn(classes.sort().values), drawn(classes[:300])
    mixed = real.take(torch.randperm(1500, generator=generator).tolist())
    ordered, shuffled = (compare_features(one, fake, CONFIG, 0)[0].value for one in (real, mixed))
    assert ordered == pytest.approx(shuffled, abs=30)  # of the first 300, that is 4 of 20 classes, it is hundreds
    both = real.take(slice(300)), fake  # nothing to cut
    uncut, as_they_are = compare_features(*both, CONFIG, 0), compare_sets(*both, "generated, real", CONFIG, 0)
    assert [row.metric for row in uncut] == [row.metric for row in as_they_are]
    assert [row.value for row in uncut] == pytest.approx([row.value for row in as_they_are])


def test_a_row_survives_its_file() -> None:
    for row in compare_features(features(24, 0), features(24, 1), CONFIG, seed=0):
        assert Row.from_json(json.loads(json.dumps(row.as_json()))) == row
