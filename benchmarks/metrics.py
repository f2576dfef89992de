"""The bars of the evaluation, as a table: what was measured, against what, and whether it holds.

    python benchmarks/metrics.py parity      # metrics against torchmetrics, prdc and scipy, at 2,000 to 10,000 × 2,048
    python benchmarks/metrics.py frechet     # seconds: ours and scipy.linalg.sqrtm's way, 2,048 dimensions
    python benchmarks/metrics.py memory      # precision/recall of 20,000 × 20,000 × 2,048: peak memory, seconds
    python benchmarks/metrics.py extractor   # images per second: extractor and bare network

Each needs minutes on two cores. Sizes by option: `--samples`, `--dimensions`.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.extractors.registry import load_extractor
from pipeline.metrics.frechet import frechet_distance, moments
from pipeline.metrics.inception_score import inception_score
from pipeline.metrics.kid import kernel_distance
from pipeline.metrics.precision_recall import precision_recall_density_coverage


@click.group()
def main() -> None:
    torch.manual_seed(0)


@main.command()
@click.option("--samples", default=2_500)
@click.option("--dimensions", default=2048)
@click.option("--rank", type=int, help="of the features; default: full")
@click.option(
    "--centred", is_flag=True, help="features around 0, instead of non-negative ones as a network's last ReLU"
)
def parity(samples: int, dimensions: int, rank: int | None, centred: bool) -> None:
    """Relative differences from the references on the same features, float64."""
    from prdc import compute_prdc
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    real, generated = (features(samples, dimensions, seed, rank, centred) for seed in (1, 2))
    generated += 0.01
    network = _FeaturesAreTheInput()
    network.num_features = dimensions
    fid = FrechetInceptionDistance(feature=network, input_img_size=(dimensions,)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature=network, subsets=5, subset_size=1000).set_dtype(torch.float64)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    row("metric", "ours", "reference", "relative difference")
    ours, expected = frechet_distance(real, generated), fid.compute().item()
    compare("FID, torchmetrics", ours, expected)
    if rank:
        exact = exact_distance(samples, dimensions, rank, centred)
        compare("FID, exact in the features' span", ours, exact)
        compare("torchmetrics' FID, exact in the span", expected, exact)
    torch.manual_seed(5)
    expected = kid.compute()[0].item()
    ours = kernel_distance(real, generated, 5, 1000, torch.Generator().manual_seed(5))[0]
    compare("KID, torchmetrics", ours, expected)
    score = InceptionScore(feature=network, splits=10)
    logits = 10 * features(samples, 1008, 3)
    score.update(logits)
    torch.manual_seed(5)
    expected = score.compute()[0].item()
    compare("IS, torchmetrics", inception_score(logits, 10, torch.Generator().manual_seed(5))[0], expected)
    reference = compute_prdc(real.numpy(), generated.numpy(), nearest_k=5)
    for name, value in vars(precision_recall_density_coverage(real, generated, 5)).items():
        compare(f"{name}, prdc", value, float(reference[name]))


@main.command()
@click.option("--samples", default=3_000)
@click.option("--dimensions", default=2048)
@click.option("--rounds", default=1)
def frechet(samples: int, dimensions: int, rounds: int) -> None:
    """Seconds of the distance from features, means and covariances included on both sides."""
    import scipy.linalg

    real, generated = features(samples, dimensions, 1), features(samples, dimensions, 2) + 0.01

    def by_sqrtm() -> float:
        (mean_x, cov_x), (mean_y, cov_y) = moments(real), moments(generated)
        root = scipy.linalg.sqrtm(cov_x.numpy() @ cov_y.numpy())
        distance = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace()
        return float(distance) - 2 * float(np.trace(root).real)

    ours, seconds = timed(lambda: frechet_distance(real, generated), rounds)
    reference, reference_seconds = timed(by_sqrtm, rounds)
    row("way", "d²", "seconds")
    row("ours", f"{ours:.10g}", f"{seconds:.2f}")
    row("scipy.linalg.sqrtm", f"{reference:.10g}", f"{reference_seconds:.2f}")
    bar("times as fast", reference_seconds / seconds, at_least=3)
    bar("relative difference", abs(ours - reference) / reference, at_most=1e-6)


@main.command()
@click.option("--samples", default=20_000)
@click.option("--dimensions", default=2048)
def memory(samples: int, dimensions: int) -> None:
    """Peak of this process: torch, both sets in float32, and the work."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(samples, dimensions, generator=generator) for _ in range(2)]
    before = peak_bytes()
    metrics, seconds = timed(lambda: precision_recall_density_coverage(sets[0], sets[1], 5), 1)
    row("metrics", str(metrics))
    row("seconds", f"{seconds:.0f}")
    row("peak with the sets alone", f"{before / 1e9:.2f} GB")
    bar("peak, GB", peak_bytes() / 1e9, at_most=2)


@main.command()
@click.option("--samples", default=128)
@click.option("--name", default="efficientnet-lite0")
@click.option("--weights")
@click.option("--rounds", default=21)
def extractor(samples: int, name: str, weights: str | None, rounds: int) -> None:
    """Images per second with resizing, scaling and collecting, and of the network alone, in turns."""
    it = load_extractor(name, torch.device("cpu"), weights=weights)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(samples)]
    batch = it.input(images[: it.batch_size])

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(samples // it.batch_size):
            it.network(batch)

    bare()
    wholes, alones = [], []
    for _ in range(rounds):  # in short turns, so that whatever else the machine does meets both
        wholes.append(timed(lambda: it(images), 1)[1])
        alones.append(timed(bare, 1)[1])
    ratios = [alone / whole for whole, alone in zip(wholes, alones, strict=True)]
    row("", "extractor, images/s", "bare network, images/s")
    row("median", f"{samples / statistics.median(wholes):.0f}", f"{samples / statistics.median(alones):.0f}")
    row("best", f"{samples / min(wholes):.0f}", f"{samples / min(alones):.0f}")
    bar("extractor / bare, median", statistics.median(ratios), at_least=0.9)


class _FeaturesAreTheInput(nn.Module):
    num_features = 1

    def forward(self, x: Tensor) -> Tensor:
        return x


def features(n: int, dimensions: int, seed: int, rank: int | None = None, centred: bool = False) -> Tensor:
    """Correlated float64 features `[n, dimensions]` of full or given rank."""
    z, mixing = _parts(n, dimensions, seed, rank or dimensions, centred)
    return z @ mixing


def exact_distance(n: int, dimensions: int, rank: int, centred: bool) -> float:
    """The Fréchet distance of `parity`'s features, from their coordinates in the span that they live in."""
    inside = []
    for seed in (1, 2):
        z, mixing = _parts(n, dimensions, seed, rank, centred)
        basis = torch.linalg.qr(mixing.T)
        inside.append(z @ basis.R.T)
    moved = inside[1].mean(dim=0) - inside[0].mean(dim=0)
    everywhere = basis.Q @ moved + 0.01
    return frechet_distance(*inside) - moved.square().sum().item() + everywhere.square().sum().item()


def _parts(n: int, dimensions: int, seed: int, rank: int, centred: bool) -> tuple[Tensor, Tensor]:
    z = torch.rand(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixing = torch.rand(rank, dimensions, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return z - 0.5 * centred, (mixing - 0.5 * centred) / rank**0.5


def timed(work: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """The result, and the median of the seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row(*cells: str) -> None:
    click.echo("| " + " | ".join(cells) + " |")


def compare(name: str, ours: float, reference: float) -> None:
    difference = abs(ours - reference) / abs(reference)
    row(name, f"{ours:.10g}", f"{reference:.10g}", f"{difference:.1e}{'' if difference <= 1e-4 else '  MISSED'}")


def bar(name: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    wanted = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}"
    row(name, f"{value:.3g}", wanted, "met" if met else "MISSED")


if __name__ == "__main__":
    main()
