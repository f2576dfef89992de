"""Golden values of torch-fidelity 0.4.0 and lpips 0.1.4 on seeded inputs (golden/make.py) are met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.extractors.inception_v3 import InceptionV3
from pipeline.extractors.lpips_vgg16 import BACKBONE, HEADS, Lpips
from pipeline.metrics.frechet import frechet_distance
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.precision_recall import precision_recall_density_coverage
from tests.metrics import seeded

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
RELATIVE = 1e-4
cases = pytest.mark.parametrize("case", seeded.CASES)


@cases
def test_frechet_distance(case: str) -> None:
    expected = GOLDEN[case]["frechet_inception_distance"]
    assert frechet_distance(*seeded.CASES[case]) == pytest.approx(expected, rel=RELATIVE)


@cases
def test_kid(case: str) -> None:
    real, generated = seeded.CASES[case]
    n = min(len(real), len(generated))
    ours, _ = kernel_distance(real[:n], generated[:n], 1, n, torch.Generator())
    assert ours == pytest.approx(GOLDEN[case]["kernel_inception_distance_mean"], rel=RELATIVE)


@cases
def test_precision_and_recall(case: str) -> None:
    ours = precision_recall_density_coverage(*seeded.CASES[case], neighbours=3)
    assert ours.precision == pytest.approx(GOLDEN[case]["precision"], rel=RELATIVE)
    assert ours.recall == pytest.approx(GOLDEN[case]["recall"], rel=RELATIVE)


def test_inception_score() -> None:
    expected = GOLDEN["inception score"]
    ours = inception_score(seeded.logits(5000, 1008), 10, generator=None)
    assert ours == pytest.approx((expected["mean"], expected["deviation"]), rel=RELATIVE)


def test_inception_network_from_its_state_dict() -> None:
    network = InceptionV3()
    network.load_state_dict(seeded.weights(network.state_dict()))
    images = (seeded.images(2, 299, seed=3).float() - 128) / 128
    with torch.inference_mode():
        features, logits, _ = network.fold_norms()(images)
    for ours, name in ((features, "features"), (logits, "logits")):
        expected = torch.tensor(GOLDEN["inception network"][name])
        torch.testing.assert_close(
            ours[:, ::64].flatten(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
        )


@pytest.mark.slow
def test_lpips_with_the_packages_own_heads(tmp_path: Path) -> None:
    import torchmetrics.functional.image as heads_are_here

    made = seeded.weights({f"features.{name}": tensor for name, tensor in Lpips().features.state_dict().items()})
    torch.save(made, tmp_path / BACKBONE)
    heads = Path(heads_are_here.__file__).parent / "lpips_models" / "vgg.pth"
    (tmp_path / HEADS).write_bytes(heads.read_bytes())
    x, y = (seeded.images(3, 64, seed).float() / 255 for seed in (3, 4))
    model = Lpips.from_folder(tmp_path)
    assert model.batched(x, y, batch_size=2).tolist() == pytest.approx(GOLDEN["lpips"], rel=RELATIVE)
    assert model.batched(x, x).tolist() == [0, 0, 0]
