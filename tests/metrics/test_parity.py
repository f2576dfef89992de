"""On the same features the metrics equal those of torchmetrics and prdc within 1e-4 relative."""

from __future__ import annotations

import pytest
import torch
from prdc import compute_prdc
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.metrics.frechet import frechet_distance, frechet_distance_of_moments, moments
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.precision_recall import precision_recall_density_coverage
from pipeline.metrics.psnr_ssim import psnr, ssim

RELATIVE = 1e-4


def features(n: int, dimensions: int, seed: int, rank: int | None = None, shift: float = 0.0) -> Tensor:
    """Correlated, non-negative float64 features, of full or given rank."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.Generator().manual_seed(99)
    inner = rank or dimensions
    z = torch.rand(n, inner, generator=generator, dtype=torch.float64) + shift
    return z @ torch.rand(inner, dimensions, generator=mixing, dtype=torch.float64) / inner**0.5


CASES = {
    "more samples than dimensions": (features(900, 256, 1), features(800, 256, 2, shift=0.02)),
    "fewer samples than dimensions": (features(300, 512, 1), features(250, 512, 2, shift=0.02)),
    "rank-deficient": (features(900, 256, 1, rank=40), features(800, 256, 2, rank=40, shift=0.05)),
    "rank-deficient, few samples": (features(300, 512, 1, rank=40), features(300, 512, 2, rank=40, shift=0.05)),
    "one set small": (features(900, 256, 1), features(100, 256, 2, shift=0.02)),
}
cases = pytest.mark.parametrize(("real", "generated"), CASES.values(), ids=CASES.keys())


class FeaturesAreTheInput(nn.Module):
    num_features = 1

    def forward(self, x: Tensor) -> Tensor:
        return x


def reference_fid(real: Tensor, generated: Tensor) -> float:
    network = FeaturesAreTheInput()
    network.num_features = real.shape[1]
    fid = FrechetInceptionDistance(feature=network, input_img_size=(real.shape[1],)).set_dtype(torch.float64)
    fid.update(real, real=True)
    fid.update(generated, real=False)
    return fid.compute().item()


@cases
def test_frechet_distance_equals_torchmetrics(real: Tensor, generated: Tensor) -> None:
    assert frechet_distance(real, generated) == pytest.approx(reference_fid(real, generated), rel=RELATIVE)


def test_frechet_distance_of_known_gaussians() -> None:
    # Same shape, moved by (3, 4): only |μ₁ − μ₂|² = 25 is left.
    x = features(500, 2, 3)
    assert frechet_distance(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-9)
    # One dimension: (σ₁ − σ₂)².
    y = features(500, 1, 4)
    assert frechet_distance(y, 3 * y - 2 * y.mean()) == pytest.approx(4 * y.var().item(), rel=1e-9)


def test_lost_rank_costs_no_digits() -> None:
    """Features that live in 30 of 512 dimensions, far from 0 as a network's are: exact within those 30."""
    z = [torch.rand(n, 30, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (700, 800)]
    mixing = 10 * torch.rand(30, 512, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    inside = torch.linalg.qr(mixing.T).R.T
    exact = frechet_distance(z[0] @ inside, z[1] @ inside)
    assert frechet_distance(z[0] @ mixing, z[1] @ mixing) == pytest.approx(exact, rel=1e-8)


def test_both_ways_to_the_frechet_distance_agree() -> None:
    real, generated = CASES["fewer samples than dimensions"]
    through_moments = frechet_distance_of_moments(*moments(real), *moments(generated))
    assert frechet_distance(real, generated) == pytest.approx(through_moments, rel=1e-6)


@cases
def test_kid_equals_torchmetrics(real: Tensor, generated: Tensor) -> None:
    reference = KernelInceptionDistance(feature=FeaturesAreTheInput(), subsets=10, subset_size=90)
    reference.set_dtype(torch.float64)
    reference.update(real, real=True)
    reference.update(generated, real=False)
    torch.manual_seed(5)
    expected = [value.item() for value in reference.compute()]
    ours = kernel_distance(real, generated, subsets=10, subset_size=90, generator=torch.Generator().manual_seed(5))
    assert ours == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize(("n", "splits"), [(1000, 10), (503, 10), (500, 1)])
def test_inception_score_equals_torchmetrics(n: int, splits: int) -> None:
    logits = 40 * features(n, 300, 1) - 300
    reference = InceptionScore(feature=FeaturesAreTheInput(), splits=splits)
    reference.update(logits)
    torch.manual_seed(5)
    mean, deviation = (value.item() for value in reference.compute())
    ours_mean, ours_deviation = inception_score(logits, splits, torch.Generator().manual_seed(5))
    assert ours_mean > 1.01
    assert ours_mean == pytest.approx(mean, rel=RELATIVE)
    if splits > 1:  # torchmetrics divides by splits − 1, Salimans et al.'s code by splits
        assert ours_deviation == pytest.approx(deviation * ((splits - 1) / splits) ** 0.5, rel=RELATIVE)


@cases
@pytest.mark.parametrize("neighbours", [1, 5])
def test_precision_recall_density_coverage_equal_prdc(real: Tensor, generated: Tensor, neighbours: int) -> None:
    expected = compute_prdc(real.numpy(), generated.numpy(), nearest_k=neighbours)
    ours = precision_recall_density_coverage(real, generated, neighbours)
    assert vars(ours) == pytest.approx(expected, rel=RELATIVE)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = CASES["one set small"]
    whole = precision_recall_density_coverage(real, generated, 5)
    monkeypatch.setattr("pipeline.metrics.neighbours.BLOCK", 77)
    assert precision_recall_density_coverage(real, generated, 5) == whole


def test_ssim_and_psnr_equal_their_references() -> None:
    x = torch.rand(3, 3, 32, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).clamp(0, 1)
    _, reference = structural_similarity_index_measure(y, x, data_range=1.0, return_full_image=True)
    # torchmetrics averages over reflected borders too; Wang et al. only where the window is inside.
    expected = reference[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim(x, y), expected, rtol=RELATIVE, atol=0)
    assert psnr(x, x + 0.1).tolist() == pytest.approx([20.0] * 3)
