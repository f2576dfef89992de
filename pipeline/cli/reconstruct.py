"""`smalti reconstruct RUN IMAGES -o DIR`: what a tokenizer makes of any images. Imports no torch until it runs."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.core.errors import UserError
from pipeline.core.text import visible

_PATH = click.Path(path_type=Path)
_FORMATS = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}"}


@click.command("reconstruct")
@click.argument("tokenizer", type=_PATH, metavar="RUN")
@click.argument("images", type=_PATH)
@click.option("-o", "--output", type=_PATH, required=True, help="folder for the sheets and metrics.json")
@click.option("--limit", type=click.IntRange(min=1), help="so many images at most")
def reconstruct(tokenizer: Path, images: Path, output: Path, limit: int | None) -> None:
    """Put IMAGES through the codes of an image tokenizer and back, and show both side by side.

    RUN is a run, or a folder with a tokenizer's config.json and model.safetensors. IMAGES is a folder of images, a
    tar, or a folder of tars; they are cropped and resized as `prepare` does it. Prints the mean PSNR and SSIM.
    """
    from pipeline.core.arithmetic import set_arithmetic
    from pipeline.core.distributed import device
    from pipeline.core.writable import check_writable
    from pipeline.evaluation.image_sets import told_left_out
    from pipeline.evaluation.reconstruction import filters_of, reconstruct_folder, tokenizer_at

    check_writable(output / "metrics.json")
    set_arithmetic(tf32=False, deterministic=False)  # as tokenize, so that the codes are those that it writes
    model = tokenizer_at(tokenizer).to(device())
    found = reconstruct_folder(model, images, filters_of(tokenizer), output, limit)
    for name, why in found.refused.items():
        click.echo(f"refused: {visible(name)}: {visible(why)}", err=True)
    if found.left_out:
        click.echo(told_left_out(found.left_out), err=True)
    if not found.metrics:
        raise UserError(f"{images}: expected images, found none that can be used ({len(found.refused)} refused)")
    told = ", ".join(_FORMATS[key].format(value) for key, value in found.means.items())
    click.echo(
        f"{told} over {len(found.metrics)} images, {len(found.refused)} refused; {found.sheets} sheets in {output}"
    )
