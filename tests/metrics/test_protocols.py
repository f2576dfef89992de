"""Published protocols on the same features: CMMD, AuthPct, the evaluator's precision and recall, sFID's features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.extractors.inception_v3 import InceptionV3
from pipeline.metrics.authenticity import authentic
from pipeline.metrics.cmmd import cmmd
from pipeline.metrics.precision_recall import membership
from tests.metrics import seeded

RELATIVE = 1e-4
REAL, GENERATED = seeded.features(130, 24, 1) - 2, seeded.features(110, 24, 2, shift=0.3) - 2


def all_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2)))


@pytest.fixture(params=["one block", "many blocks"])
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr("pipeline.metrics.neighbours.BLOCK", 32)


@pytest.mark.usefixtures("block_size")
def test_cmmd_is_the_papers_formula() -> None:
    x, y = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (REAL, GENERATED))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-(all_distances(a, b) ** 2) / (2 * 10.0**2)).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert expected > 0.01
    assert cmmd(REAL, GENERATED) == pytest.approx(expected, rel=RELATIVE)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-9)
    assert cmmd(3 * REAL, GENERATED) == pytest.approx(expected, rel=RELATIVE)  # of directions, not of lengths


@pytest.mark.usefixtures("block_size")
def test_authenticity_is_dgm_evals() -> None:
    near_copies = REAL[:40] + 1e-3
    generated = np.concatenate([GENERATED[:60], near_copies])
    among, to = all_distances(REAL, REAL), all_distances(REAL, generated)
    np.fill_diagonal(among, np.inf)
    expected = among.min(axis=0)[to.argmin(axis=0)] < to.min(axis=0)
    found = authentic(REAL, generated)
    assert found.tolist() == expected.tolist()
    assert found[:60].any()
    assert not found[60:].any()


def test_one_training_image_has_no_nearest_other() -> None:
    with pytest.raises(UserError, match="at least 2 samples"):
        authentic(REAL[:1], GENERATED)


@pytest.mark.usefixtures("block_size")
def test_precision_and_recall_at_3_are_the_evaluators() -> None:
    """Of whole numbers, whose distances tie: a ball's surface belongs to it."""
    x, y = (np.random.default_rng(seed).integers(0, 7, (100, 3)).astype(np.float64) for seed in (1, 2))
    to = all_distances(x, y)
    radius_x, radius_y = (np.sort(all_distances(values, values), axis=1)[:, 3] for values in (x, y))
    precision, recall = (to <= radius_x[:, None]).any(axis=0), (to <= radius_y[None]).any(axis=1)
    found = membership(x, y, 3)
    assert found.precision.tolist() == precision.astype(float).tolist()
    assert found.recall.tolist() == recall.astype(float).tolist()
    assert not np.array_equal(precision, (to < radius_x[:, None]).any(axis=0))  # the case has ties that count


@pytest.mark.slow
def test_spatial_features_are_seven_channels_of_the_7th_block_in_tensorflows_order() -> None:
    network = InceptionV3().eval()
    network.load_state_dict(seeded.weights(network.state_dict()))
    seen: list[torch.Tensor] = []
    network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        *_, spatial = network((seeded.images(1, 299, seed=3).float() - 128) / 128)
    activations = seen[0]
    assert activations.shape == (1, 192, 17, 17)
    assert spatial.shape == (1, 2023)
    assert spatial[0].tolist() == [v for row in activations[0, :7].permute(1, 2, 0).tolist() for p in row for v in p]
