"""`smalti evaluate --real A --fake B`: the metrics of any two sets of images, whoever made them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.stage import run_stage_here
from pipeline.config.evaluate import EXTRACTORS
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.evaluate import EvaluateConfig
    from pipeline.evaluation.comparison import Row
    from pipeline.extractors.base import FeatureSet

_PATH = click.Path(path_type=Path)
_CACHE = Path("runs/.cache/features")


@click.command("evaluate")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--real", type=_PATH, help="a folder of images, a tar, a folder of tars, or a feature file")
@click.option("--fake", type=_PATH, help="likewise")
@click.option("--extractor", type=click.Choice(EXTRACTORS), default=EXTRACTORS[0], show_default=True)
@click.option("--weights", help="of the extractor: Inception's file; a folder or name for clip and dinov2")
@click.option("--clip", help="also judge the fake images by their captions (.txt beside them), with this CLIP model")
@click.option("--samples", type=int, help="images a set  [default: the smaller set's]")
@click.option("--neighbours", default=5, show_default=True, help="k of precision, recall, density, coverage")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--cache", type=_PATH, default=_CACHE, show_default=True, help="folder of features by content hash")
@click.option("--cache-gb", "feature_cache_gb", type=float, help="bound of the cache  [default: 20]")
@click.option("-o", "--output", type=_PATH, help="write the metrics there, as JSON")
@click.option("--save-real", type=_PATH, help="write the features of --real there (.npz), for later comparisons")
@click.option("--save-fake", type=_PATH, help="likewise of --fake")
@click.option("--config", "config_path", help="instead: run the stage evaluate of this config")
@click.option("--print-config", is_flag=True, help="with --config: print the stage's resolved config and do nothing")
def evaluate(
    overrides: tuple[str, ...],
    real: Path | None,
    fake: Path | None,
    cache: Path,
    output: Path | None,
    save_real: Path | None,
    save_fake: Path | None,
    config_path: str | None,
    print_config: bool,
    seed: int,
    **options: Any,
) -> None:
    """Measure one set of images against another, or, with --config, a pipeline's run.

    Fréchet distance and FD∞, KID, Inception Score, precision, recall, density and coverage, at equal numbers of
    images. Several processes (torchrun -m pipeline evaluate …) share the extraction of features.
    """
    if config_path:
        if print_config:
            from pipeline.config.base import to_yaml
            from pipeline.config.pipeline import load_pipeline

            click.echo(to_yaml(load_pipeline(config_path, overrides).evaluate), nl=False)
            return
        run_stage_here("evaluate", ["--config", config_path, *overrides])
    if real is None or fake is None:
        raise UserError("expected two sets of images, found fewer: smalti evaluate --real FOLDER --fake FOLDER")
    if overrides:
        raise UserError(f"expected options only (overrides go with --config), found '{overrides[0]}'")

    from pipeline.config.base import parse_config
    from pipeline.config.evaluate import EvaluateConfig
    from pipeline.core.atomic_io import write_json
    from pipeline.core.distributed import init, is_main
    from pipeline.evaluation.feature_store import trim

    init()
    given = {name: value for name, value in options.items() if value is not None}
    config = parse_config(EvaluateConfig, given, where="smalti evaluate")
    sets = _feature_sets(real, fake, config, cache)
    if not is_main():
        return
    rows = _rows(*sets, fake, config, cache, seed)
    trim(cache, config.feature_cache_gb)
    for path, features in ((save_real, sets[0]), (save_fake, sets[1])):
        if path:
            from pipeline.evaluation.feature_store import save_features

            save_features(features, path)
    if output:
        write_json(output, {"real": str(real), "fake": str(fake), "seed": seed, "rows": [r.as_json() for r in rows]})
    click.echo(table(rows))


def _feature_sets(real: Path, fake: Path, config: EvaluateConfig, cache: Path) -> tuple[FeatureSet, FeatureSet]:
    """Both sets, from feature files where they are; what is extracted goes to the cache, ranks sharing the work."""
    from pipeline.core import distributed
    from pipeline.evaluation.feature_store import FeatureStore, check_same_extractor, is_feature_file, read_features
    from pipeline.evaluation.image_sets import images_at
    from pipeline.extractors.registry import load_extractor

    for path in (real, fake):
        if not path.exists():
            raise UserError(f"{path}: expected a folder of images, a tar or a feature file, found nothing")
    store = None
    if not (is_feature_file(real) and is_feature_file(fake)):
        extractor = load_extractor(config.extractor, distributed.device(), config.batch_size, config.weights)
        store = FeatureStore(cache, extractor)
    found = []
    sizes: dict[str, Counter[tuple[int, int]]] = {}
    for path, what in ((real, "real"), (fake, "fake")):
        if store is None or is_feature_file(path):
            found.append(read_features(path))
            continue
        images = images_at(path)
        store.extract(images, distributed.rank(), distributed.world_size(), f"{what} images")
        sizes[what] = store.sizes(images)
        distributed.barrier()
        if distributed.is_main():
            found.append(store.features(images, f"{what} images"))
        distributed.barrier()
        if not distributed.is_main():
            found.append(store.features(images))
    check_same_extractor(*found)
    if distributed.is_main():
        _tell_sizes(sizes)
    return found[0], found[1]


def _tell_sizes(sizes: dict[str, Counter[tuple[int, int]]]) -> None:
    """Warn of mixed sizes: every image is resized on its own, and an enlarged one looks blurred to a network."""
    for what, found in (*sizes.items(), ("real and fake", sum(sizes.values(), Counter()))):
        if len(found) > 1 and (what != "real and fake" or all(len(other) == 1 for other in sizes.values())):
            shown = ", ".join(f"{count} of {width} × {height}" for (width, height), count in found.most_common(3))
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            click.echo(
                f"warning: {what} images: expected one size, found {len(found)} ({shown}{more}); each is resized on "
                "its own, which the metrics see",
                err=True,
            )


def _rows(real: FeatureSet, fake: FeatureSet, path: Path, config: EvaluateConfig, cache: Path, seed: int) -> list[Row]:
    from pipeline.evaluation.comparison import caption_rows, compare_features

    rows = compare_features(real, fake, config, seed, cache)
    if config.clip:
        from pipeline.core.distributed import device
        from pipeline.evaluation.feature_store import FeatureStore
        from pipeline.evaluation.image_sets import images_at
        from pipeline.extractors.clip_scorer import ClipScorer

        images = [image for image in images_at(path) if image.caption]
        if not images:
            raise UserError(f"--clip: expected captions (a .txt beside each image) in {path}, found none")
        judge = ClipScorer(config.clip, device(), config.batch_size)
        embedded = FeatureStore(cache, judge.images).features(images, "CLIP's features")
        captions = judge.captions([image.caption or "" for image in images])
        rows += caption_rows(embedded, captions, "generated, their captions", seed)
    return rows


def table(rows: list[Row]) -> str:
    """A line a metric, then which extractor saw how many images, then the warnings."""
    from pipeline.evaluation.comparison import warnings

    width = max(len(row.metric) for row in rows)
    lines = []
    for row in rows:
        value = "–" if row.value is None else f"{row.value:.5g}"
        interval = f"   {row.interval[0]:.5g} … {row.interval[1]:.5g}" if row.interval else ""
        lines.append(f"{row.metric:<{width}}  {'↓' if row.better == 'lower' else '↑'} {value:>10}{interval}")
    seen: dict[str, tuple[int, int]] = {}
    for row in rows:
        about = f"{row.extractor}, weights {(row.weights_sha256 or '')[:12]}, resized to {row.resize}"
        real, fake = seen.get(about, (0, 0))
        seen[about] = max(real, row.n_real), max(fake, row.n_generated)
    for about, (real, fake) in seen.items():
        lines.append(f"\nfeatures: {about}; {real or 'no'} real and {fake} fake images")
    lines += [f"warning: {text}" for text in warnings(row.as_json() for row in rows)]
    return "\n".join(lines)
