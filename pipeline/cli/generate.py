"""`smalti generate RUN "a prompt" …`: images and a grid from a finished run or an export."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.stage import TAKE_OVER, refuse_other_options, run_stage_here, stage_arguments
from pipeline.core.errors import UserError
from pipeline.core.text import clean_text, decode_text

if TYPE_CHECKING:
    from pipeline.config.generate import SamplingConfig
    from pipeline.sampling.image_prompt import ImagePrompt
    from pipeline.sampling.model_source import ModelSource
    from pipeline.sampling.to_directory import GenerateJob

Options = dict[str, Any]  # what click parsed, by name
_image = click.Path(path_type=Path)
_count = click.IntRange(min=1)
_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_schedule", "guidance_interval", "dtype"),
    *("passes", "schedule", "pass_order", "temperature_end", "speculate"),
)
_IMAGE_RULES = ("keep_rows", "keep_levels", "mask", "extend")


@click.command("generate")
@click.argument("arguments", nargs=-1, metavar="RUN [PROMPT]...")
@click.option("--prompts", "prompts_file", type=_image, help="a text file with one prompt per line")
@click.option("-n", "--candidates", type=_count, default=1, show_default=True, help="images drawn per prompt")
@click.option("--keep", type=_count, help="keep only the best of the candidates, as the reranker sees them")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("-o", "--output", type=_image, default="images", show_default=True)
@click.option("--temperature", type=float, help="default, as of all settings: generate.sampling of the run's config")
@click.option("--top-k", type=_count)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--guidance", type=float, help="classifier-free guidance scale; 1: off")
@click.option("--guidance-schedule", type=click.Choice(["constant", "linear", "cosine", "power"]))
@click.option("--guidance-interval", type=(float, float), help="the part of each level that is guided, e.g. 0 0.8")
@click.option(
    "--passes", type=_count, help="of the transformer for each image, if its order is any; default: one a code"
)
@click.option("--schedule", type=click.Choice(["cosine", "linear"]), help="how many codes each pass draws")
@click.option("--pass-order", type=click.Choice(["random", "halton", "confidence"]), help="which codes come next")
@click.option("--temperature-end", type=float, help="of the last pass of models of order any or scale")
@click.option(
    "--speculate", type=click.IntRange(2, 64), help="codes guessed at a time, of one image; in fp32 the same one"
)
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16"]))
@click.option("--best", is_flag=True, help="with the best setting that a sweep of this run found (evaluate.sweep)")
@click.option("--image", type=_image, help="an image to start from, with one of the next four")
@click.option("--keep-rows", type=_count, help="complete it: rows of codes that stay, from the top")
@click.option("--keep-levels", type=_count, help="vary it: coarse levels that stay")
@click.option("--mask", type=_image, help="fill it: an image, white where new pixels are wanted")
@click.option("--extend", help="go on beyond an edge: left=8 or top=4,left=8 moves the image by so many pixels")
@click.option("--step", type=_count, help="with the transformer of this checkpoint of the run; it may be in training")
@click.option("--reranker", type=_image, help="folder of a pretrained CLIP, in place of the run's own reranker")
@click.option(
    "--batch-size",
    type=_count,
    default=64,
    show_default=True,
    help="images drawn at once; never changes them",
)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the step; docs/sampling.md says when it pays")
@click.option("--npz", type=_image, help="also write the images there as guided-diffusion's evaluator reads them")
@click.option("--preview/--no-preview", default=None, help="watch the first image fill in; default: on a terminal")
@click.option("--config", "config_path", help="instead: run the stage generate of this config; arguments are overrides")
@click.option("--take-over", is_flag=True, help=f"with --config: {TAKE_OVER}")
def generate(
    arguments: tuple[str, ...], prompts_file: Path | None, config_path: str | None, take_over: bool, **options: Any
) -> None:
    """Generate prompts with the models of a finished run, or of a folder that `smalti export` wrote.

    OUTPUT is an image file (.png, .jpg, .webp), which gets all images on one sheet, or a folder, which gets each image
    (<prompt>-<rank>.png) and grid.png. Into a folder the same command resumes where it was stopped.

    Without a prompt, --npz FILE writes the images that the stage generate of RUN made for the metrics.
    """
    npz: Path | None = options["npz"]
    if npz:
        _check_npz(npz, config_path)
    if config_path:
        refuse_other_options("generate")
        run_stage_here("generate", stage_arguments(config_path, take_over, arguments))
    if not arguments:
        raise UserError('expected a run directory and a prompt: smalti generate runs/openmoji "red heart"')
    prompts = [*map(_prompt, arguments[1:]), *_lines(prompts_file)]
    if not prompts and npz:
        _write_npz(npz, Path(arguments[0]), Path(arguments[0]) / "generate" / "samples")
        return
    if not prompts:
        raise UserError('expected a prompt, found none: smalti generate runs/openmoji "red heart"')

    from pipeline.core.distributed import device
    from pipeline.sampling.model_source import find_models
    from pipeline.sampling.pipeline import Pipeline, sampling_dtype
    from pipeline.sampling.save import check_output
    from pipeline.sampling.to_directory import check_sheet, generate_folder, generate_sheet

    # What is wrong with the command is told before the models load, which takes minutes for large ones.
    output, source = options["output"], find_models(Path(arguments[0]), options["step"])
    job = _job(prompts, _sampling(Path(arguments[0]), source, options), options)
    is_sheet = check_output(output)
    if is_sheet and npz:
        raise UserError(f"--npz: expected a folder for the images, found the sheet {output}: give -o FOLDER")
    if is_sheet:
        check_sheet(job, output, source)
    where = device()
    dtype = sampling_dtype(job.sampling.dtype, where)
    pipeline = Pipeline.from_pretrained(arguments[0], where, options["reranker"], dtype, options["step"])
    count = (generate_sheet if is_sheet else generate_folder)(pipeline, job, output)
    click.echo(f"{count} images in {output}", err=True)
    if npz:
        _write_npz(npz, Path(arguments[0]), output, prompts, job.images_per_prompt)


def _check_npz(path: Path, config_path: str | None) -> None:
    """Refuse before anything is generated what could not be written."""
    from pipeline.core.writable import check_writable

    if config_path:
        raise UserError("--npz: expected a finished run, found --config: run it, then smalti generate RUN --npz FILE")
    if path.suffix != ".npz":
        raise UserError(f"--npz {path}: expected a name that ends in .npz, found '{path.suffix}'")
    check_writable(path)


def _write_npz(path: Path, model: Path, source: Path, prompts: Sequence[str] = (), of_each: int = 0) -> None:
    """Write the images at `source`, with the class of each where the model is of classes.

    `prompts`: only their images, so many of each.
    """
    from pipeline.evaluation.evaluator_npz import write_images
    from pipeline.evaluation.image_sets import images_at
    from pipeline.text_tokenizer.bpe import TextTokenizer

    images = images_at(source)
    if prompts:
        named = {f"{i:06d}-{rank:02d}": prompt for i, prompt in enumerate(prompts) for rank in range(of_each)}
        images = [image for image in images if image.key in named]
        captions = [named[image.key] for image in images]
    else:
        captions = [image.caption or "" for image in images]
    labels = TextTokenizer.from_pretrained(model / "text-tokenizer").labels(captions)
    write_images(path, (image.image for image in images), len(images), labels)
    click.echo(f"{len(images)} images in {path}", err=True)


def _job(prompts: list[str], sampling: SamplingConfig, options: Options) -> GenerateJob:
    from pipeline.sampling.to_directory import GenerateJob

    return GenerateJob(
        prompts,
        candidates=options["candidates"],
        keep=options["keep"],
        seed=options["seed"],
        sampling=sampling,
        image_prompt=_image_prompt(options),
        image_prompt_options={name: str(options[name]) for name in ("image", *_IMAGE_RULES) if options[name]},
        batch_size=options["batch_size"],
        compiled=options["compiled"],
        preview=sys.stderr.isatty() if options["preview"] is None else options["preview"],
    )


def _sampling(run_directory: Path, source: ModelSource, options: Options) -> SamplingConfig:
    """The run's own settings, over them those of --best, over them the options that were given."""
    from pipeline.config.base import parse_config
    from pipeline.config.generate import SamplingConfig

    values = source.sampling.model_dump()
    if options["best"]:
        values |= _best(run_directory)
    values |= {name: options[name] for name in _SAMPLING if options[name] is not None}
    return parse_config(SamplingConfig, values, where="sampling")


def _image_prompt(options: Options) -> ImagePrompt | None:
    from pipeline.sampling.image_prompt import ImagePrompt, extended
    from pipeline.sampling.save import open_image

    rules = {name: options[name] for name in _IMAGE_RULES if options[name] is not None}
    if options["image"] is None:
        if rules:
            raise UserError(f"--{next(iter(rules)).replace('_', '-')} needs an image to start from: add --image IMAGE")
        return None
    if "mask" in rules:
        rules["mask"] = open_image(rules["mask"], "--mask", background="black")
    if "extend" in rules:
        if len(rules) > 1:
            raise UserError(f"--extend makes a mask of its own: leave out --{next(iter(rules)).replace('_', '-')}")
        return extended(open_image(options["image"], "--image"), _sides(rules["extend"]))
    return ImagePrompt(open_image(options["image"], "--image"), **rules)


def _sides(text: str) -> dict[str, int]:
    """Of "top=4,left=8"."""
    found = re.fullmatch(r"\w+=\d+(,\w+=\d+)?", text)
    if not found:
        raise UserError(f"--extend: expected a side and pixels, as left=8 or top=4,left=8, found {text!r}")
    return {side: int(pixels) for side, pixels in (part.split("=") for part in text.split(","))}


def _best(run_directory: Path) -> Options:
    """The sampling settings that the stage evaluate wrote down as the best of its sweep."""
    import yaml

    from pipeline.orchestration.run_directory import RunDirectory

    path = run_directory / "evaluate" / "best.yaml"
    runs = RunDirectory(run_directory)
    stale = runs.manifest("evaluate") is not None and not runs.is_of_these_inputs("evaluate")
    if stale or not path.is_file():
        found_there = "that of other models" if stale else "none"
        raise UserError(
            f"--best: expected the result of a sweep at {path}, found {found_there}; "
            "run `smalti evaluate --config` with evaluate.sweep first"
        )
    found: Options = yaml.safe_load(path.read_text())["generate"]["sampling"]
    return found


def _prompt(text: str) -> str:
    """A prompt as captions are: without what nobody sees. Raises UserError if nothing is left."""
    if not (prompt := clean_text(text)):
        raise UserError(f"expected a prompt, found {text!r}, in which nothing can be seen: write what the image shows")
    return prompt


def _lines(path: Path | None) -> list[str]:
    """The prompts of a file, without lines in which nothing can be seen."""
    if path is None:
        return []
    if not path.is_file():
        raise UserError(f"no prompts file at {path}: expected a text file with one prompt per line")
    try:
        # By line feeds alone: splitlines() would also split at control characters within a prompt.
        lines = [clean_text(line) for line in decode_text(path.read_bytes()).split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected a text file in UTF-8 with one prompt per line ({error.reason})") from error
    return [line for line in lines if line]
