"""`smalti evaluate --real A --fake B`: the metrics of any two sets of images, whoever made them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.stage import TAKE_OVER, refuse_other_options, run_stage_here, stage_arguments
from pipeline.config.evaluate import EXTRACTORS
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.compare_paths import ReadSets
    from pipeline.evaluation.rows import Row

_PATH = click.Path(path_type=Path)
_CACHE = Path("runs/.cache/features")


@click.command("evaluate")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--real", type=_PATH, help="a folder of images, a tar, a folder of tars, a feature file, or an evaluator's .npz"
)
@click.option("--fake", type=_PATH, help="likewise")
@click.option("--extractor", type=click.Choice(EXTRACTORS), default=EXTRACTORS[0], show_default=True)
@click.option("--weights", help="of the extractor: Inception's file; a folder or name for clip and dinov2")
@click.option("--clip", help="also score the fake images by their captions (.txt beside them), with this CLIP model")
@click.option("--samples", type=int, help="images per set  [default: the smaller set's]")
@click.option("--neighbours", default=5, show_default=True, help="k of precision, recall, density, coverage")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--cache", type=_PATH, default=_CACHE, show_default=True, help="folder of features by content hash")
@click.option("--cache-gb", "feature_cache_gb", type=float, help="bound of the cache  [default: 20]")
@click.option("-o", "--output", type=_PATH, help="write the metrics there, as JSON")
@click.option("--save-real", type=_PATH, help="write the features of --real there (.npz), for later comparisons")
@click.option("--save-fake", type=_PATH, help="likewise of --fake")
@click.option("--npz", type=_PATH, help="write the images of --fake there as guided-diffusion's evaluator reads them")
@click.option("--config", "config_path", help="instead: run the stage evaluate of this config")
@click.option("--print-config", is_flag=True, help="with --config: print the stage's resolved config and do nothing")
@click.option("--take-over", is_flag=True, help=f"with --config: {TAKE_OVER}")
def evaluate(
    overrides: tuple[str, ...],
    real: Path | None,
    fake: Path | None,
    cache: Path,
    output: Path | None,
    save_real: Path | None,
    save_fake: Path | None,
    npz: Path | None,
    config_path: str | None,
    print_config: bool,
    take_over: bool,
    seed: int,
    **options: object,
) -> None:
    """Measure one set of images against another, or, with --config, a pipeline's run.

    Fréchet distance and FD∞, KID, Inception Score, precision, recall, density and coverage, at equal numbers of
    images. Several processes (torchrun -m pipeline evaluate …) share the extraction of features.
    """
    if config_path:
        if npz:
            raise UserError("--npz: expected --real and --fake, found --config: smalti generate RUN --npz FILE has it")
        refuse_other_options("evaluate")
        if print_config:
            from pipeline.config.base import to_yaml
            from pipeline.config.pipeline import load_pipeline

            click.echo(to_yaml(load_pipeline(config_path, overrides).evaluate), nl=False)
            return
        run_stage_here("evaluate", stage_arguments(config_path, take_over, overrides))
    if real is None or fake is None:
        raise UserError("expected two sets of images, found fewer: smalti evaluate --real FOLDER --fake FOLDER")
    if overrides:
        raise UserError(f"expected options only (overrides go with --config), found '{overrides[0]}'")

    from pipeline.config.base import parse_config
    from pipeline.config.evaluate import EvaluateConfig
    from pipeline.core.arithmetic import set_arithmetic
    from pipeline.core.atomic_io import write_json
    from pipeline.core.distributed import init, is_main
    from pipeline.core.writable import check_writable
    from pipeline.evaluation.compare_paths import captioned_rows, read_sets
    from pipeline.evaluation.feature_store import trim

    for path in (save_real, save_fake, npz):
        if path and path.suffix != ".npz":
            raise UserError(f"{path}: expected a name that ends in .npz, found '{path.suffix}'")
    for path in (output, save_real, save_fake, npz, cache / "features"):
        if path:
            check_writable(path)
    init()
    set_arithmetic(tf32=False, deterministic=False)  # published features are of float32
    given = {name: value for name, value in options.items() if value is not None}
    config = parse_config(EvaluateConfig, given, where="smalti evaluate")
    sets = read_sets(real, fake, config, cache)
    if not is_main():
        return
    for what, found in sets.images.items():
        click.echo(f"{what}: {found.told()}", err=True)
    for text in sets.warnings:
        click.echo(f"warning: {text}", err=True)
    rows = sets.rows(config, seed, cache)
    rows += captioned_rows(fake, config, cache, seed)
    trim(cache, config.feature_cache_gb)
    _save_features(sets, save_real, save_fake)
    if npz:
        _write_npz(npz, fake)
    if output:
        about = {"real": str(real), "fake": str(fake), "seed": seed, "sets": _counted(sets)}
        write_json(output, about | {"rows": [row.as_json() for row in rows]})
    click.echo(table(rows))


def _save_features(sets: ReadSets, save_real: Path | None, save_fake: Path | None) -> None:
    from pipeline.evaluation.feature_store import save_features

    if save_real and sets.real is None:
        raise UserError("--save-real: expected features, found only statistics in --real; leave it out")
    for path, features in ((save_real, sets.real), (save_fake, sets.fake)):
        if path and features:
            save_features(features, path)


def _counted(sets: ReadSets) -> dict[str, object]:
    """By "real" and "fake": how many images there are, and what was left out."""
    return {
        what: {"images": len(found.images), "left_out": [{"name": n, "reason": r} for n, r in found.left_out]}
        for what, found in sets.images.items()
    }


def _write_npz(path: Path, fake: Path) -> None:
    """The images at `fake`. Raises UserError where there are none, or of several sizes."""
    from pipeline.evaluation.evaluator_npz import write_images
    from pipeline.evaluation.feature_store import is_feature_file
    from pipeline.evaluation.image_sets import images_at

    if is_feature_file(fake):
        raise UserError(f"--npz: expected images as --fake, found features in {fake}: give the images")
    images = images_at(fake)
    write_images(path, (image.image for image in images), len(images))
    click.echo(f"{len(images)} images in {path}", err=True)


def table(rows: list[Row]) -> str:
    """A line per metric with its protocol and n, then which extractor saw how many images, then the warnings."""
    from pipeline.evaluation.rows import warnings

    width = max(len(row.metric) for row in rows)
    lines = []
    for row in rows:
        value = "–" if row.value is None else f"{row.value:.5g}"
        interval = f"   {row.interval[0]:.5g} … {row.interval[1]:.5g}" if row.interval else ""
        about = f"{row.protocol}, n = {row.n_generated:,}"
        lines.append(
            f"{row.metric:<{width}}  {'↓' if row.better == 'lower' else '↑'} {value:>10}{interval:<24}   {about}"
        )
    seen: dict[str, tuple[int, int]] = {}
    for row in rows:
        about = f"{row.extractor}, weights {(row.weights_sha256 or '')[:12]}, resized to {row.resize}"
        real, fake = seen.get(about, (0, 0))
        seen[about] = max(real, row.n_real), max(fake, row.n_generated)
    for about, (real, fake) in seen.items():
        lines.append(f"\nfeatures: {about}; {real or 'no'} real and {fake} fake images")
    if against := [row for row in rows if "statistics" in row.compares]:
        lines.append(f"{', '.join(row.metric for row in against)}: {against[0].compares}, all fake images")
    lines += [f"warning: {text}" for text in warnings(rows)]
    return "\n".join(lines)
