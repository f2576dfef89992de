"""`smalti generate RUN "a prompt" …`: pictures and a grid from a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.errors import UserError
from pipeline.runs import config_of
from pipeline.stage import run_stage_here


@click.command("generate")
@click.argument("arguments", nargs=-1, metavar="RUN [PROMPT]...")
@click.option("--prompts", "prompts_file", type=click.Path(path_type=Path), help="a text file with a prompt a line")
@click.option("-n", "--candidates", default=1, show_default=True, help="pictures a prompt")
@click.option("--seed", default=0, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default="pictures", show_default=True)
@click.option("--temperature", type=float, help="default: as generate.sampling of the run's config")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--guidance", type=float, help="classifier-free guidance scale; 1: off")
@click.option("--best", is_flag=True, help="with the best setting that a sweep of this run found (evaluate.sweep)")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--config", "config_path", help="instead: run the stage generate of this config; arguments are overrides")
def generate(
    arguments: tuple[str, ...],
    prompts_file: Path | None,
    candidates: int,
    seed: int,
    output: Path,
    batch_size: int,
    best: bool,
    config_path: str | None,
    **sampling: float | None,
) -> None:
    """Paint prompts with the models of a finished run.

    OUTPUT is a picture file (.png), which gets all pictures on one sheet, or a folder, which gets each picture
    and grid.png.
    """
    if config_path:
        run_stage_here("generate", ["--config", config_path, *arguments])
    wanted = [*arguments[1:], *_lines(prompts_file)]
    if not wanted:
        raise UserError('expected a prompt, found none: smalti generate runs/openmoji "red heart"')

    from pipeline.config import parse_config
    from pipeline.distributed import device
    from pipeline.graph import load_pipeline
    from pipeline.progress import progress
    from pipeline.sampling.config import SamplingConfig
    from pipeline.sampling.grid import Group, Tile, grid
    from pipeline.sampling.pipeline import Pipeline
    from pipeline.sampling.save import save_picture

    run_directory = Path(arguments[0])
    config = load_pipeline(config_of(run_directory))
    chosen = config.generate.sampling.model_dump() | (_best(run_directory) if best else {})
    chosen |= {k: v for k, v in sampling.items() if v is not None}
    settings = parse_config(SamplingConfig, chosen, where="sampling")
    if settings.guidance != 1 and config.transformer.caption_dropout == 0:
        raise UserError("--guidance needs a transformer trained with caption_dropout above 0; this run's has none")
    pipeline = Pipeline.from_pretrained(run_directory, device())
    with progress(total=len(wanted) * candidates, description="generate", unit="picture") as bar:
        pictures = pipeline.generate(wanted, candidates, seed, settings, batch_size=batch_size, on_pictures=bar.update)
    captions = [prompt for prompt in wanted for _ in range(candidates)]
    sheet = grid([Group("", [Tile(p, c) for p, c in zip(pictures, captions, strict=True)])])
    if output.suffix:
        save_picture(sheet, output, {"prompts": wanted, "seed": seed, "sampling": settings.model_dump()})
    else:
        for index, (picture, prompt) in enumerate(zip(pictures, captions, strict=True)):
            about = {"prompt": prompt, "seed": seed, "candidate": index % candidates, "sampling": settings.model_dump()}
            save_picture(picture, output / f"{index:04d}.png", about)
        save_picture(sheet, output / "grid.png", {"prompts": wanted, "seed": seed})
    click.echo(f"{len(pictures)} pictures in {output}", err=True)


def _best(run_directory: Path) -> dict[str, Any]:
    """What the stage evaluate wrote down as the best setting of its sweep."""
    import yaml

    path = run_directory / "evaluate" / "best.yaml"
    if not path.is_file():
        raise UserError(
            f"--best: expected the result of a sweep at {path}, found none; "
            "run `smalti evaluate --config` with evaluate.sweep first"
        )
    found: dict[str, Any] = yaml.safe_load(path.read_text())["generate"]["sampling"]
    return found


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise UserError(f"no prompts file at {path}: expected a text file with a prompt a line")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
