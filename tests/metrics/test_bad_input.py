"""What cannot be measured is said in one line: what was expected, what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.config.evaluate import EXTRACTORS
from pipeline.core.errors import UserError
from pipeline.evaluation.image_sets import named_images
from pipeline.extractors.registry import load_extractor
from pipeline.metrics.frechet import frechet_distance
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.precision_recall import precision_recall_density_coverage
from pipeline.metrics.psnr_ssim import psnr, ssim

GENERATOR = torch.Generator()
SetMetric = Callable[[torch.Tensor, torch.Tensor], object]


def kid(real: torch.Tensor, generated: torch.Tensor) -> tuple[float, float]:
    return kernel_distance(real, generated, subsets=2, subset_size=4, generator=GENERATOR)


def manifold(real: torch.Tensor, generated: torch.Tensor) -> object:
    return precision_recall_density_coverage(real, generated, neighbours=3)


@pytest.mark.parametrize("metric", [frechet_distance, kid, manifold])
class TestMetricsOfSets:
    def test_nan_is_found(self, metric: SetMetric) -> None:
        bad = torch.rand(10, 8)
        bad[7, 3] = torch.nan
        with pytest.raises(UserError, match=r"generated: .*NaN or infinity in 1 of 10 samples .*sample 7"):
            metric(torch.rand(10, 8), bad)

    def test_empty_set_is_found(self, metric: SetMetric) -> None:
        with pytest.raises(UserError, match=r"real: expected at least . samples .*found 0"):
            metric(torch.rand(0, 8), torch.rand(10, 8))

    def test_features_of_another_extractor_are_found(self, metric: SetMetric) -> None:
        with pytest.raises(UserError, match="equal dimensions, found 8 and 9"):
            metric(torch.rand(10, 8), torch.rand(10, 9))

    def test_wrong_shape_is_found(self, metric: SetMetric) -> None:
        with pytest.raises(
            UserError, match=r"real: expected an array \[samples, dimensions\], found shape \(10, 8, 2\)"
        ):
            metric(torch.rand(10, 8, 2), torch.rand(10, 8))


def test_fewer_samples_than_neighbours() -> None:
    with pytest.raises(UserError, match=r"at least 4 samples .3 neighbours .* found 3"):
        manifold(torch.rand(3, 8), torch.rand(9, 8))


def test_fewer_samples_than_a_kid_subset() -> None:
    with pytest.raises(UserError, match=r"at least 4 samples .KID's subset_size.* found 3"):
        kid(torch.rand(9, 8), torch.rand(3, 8))


def test_fewer_samples_than_splits() -> None:
    with pytest.raises(UserError, match=r"at least 10 samples .one per split.* found 9"):
        inception_score(torch.rand(9, 8), 10, GENERATOR)


def test_reconstructions_of_another_size() -> None:
    with pytest.raises(UserError, match="equal shapes"):
        psnr(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 8))
    with pytest.raises(UserError, match="at least 11 × 11 pixels"):
        ssim(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))


def test_unknown_extractor_names_the_known() -> None:
    with pytest.raises(UserError, match=f"expected one of {', '.join(EXTRACTORS)}, found 'inception'"):
        load_extractor("inception", torch.device("cpu"))


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no image"):
        list(named_images(tmp_path))
    with pytest.raises(UserError, match="expected images, found none"):
        load_extractor("efficientnet-lite0", torch.device("cpu"))([])


def test_damaged_image_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"b\.png: expected an image"):
        list(named_images(tmp_path))
