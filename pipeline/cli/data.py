"""`smalti data inspect` and `smalti data export`. Imports no torch until a command runs."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Look into image shards and token arrays."""


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--sheet", type=click.Path(path_type=Path), help="write a contact sheet to this PNG file")
@click.option("--verify/--no-verify", default=True, help="compare every file with its checksum (default)")
def inspect(path: Path, sheet: Path | None, verify: bool) -> None:
    """Counts, sizes, captions and checksums of PATH: a run, its prepare or its tokenize directory."""
    from pipeline.data.inspect import inspect_directory

    for line in inspect_directory(path, sheet, verify):
        click.echo(line)


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="folder to write to")
@click.option("-n", "--count", default=16, show_default=True, type=click.IntRange(min=1), help="samples")
@click.option("--split", default="train", show_default=True, type=click.Choice(["train", "val"]))
@click.option("--image-tokenizer", type=click.Path(path_type=Path), help="by default that of the same run")
@click.option("--text-tokenizer", type=click.Path(path_type=Path), help="by default that of the same run")
def export(
    path: Path, out: Path, count: int, split: str, image_tokenizer: Path | None, text_tokenizer: Path | None
) -> None:
    """Decode token arrays back to images and captions. PATH: a run or its tokenize directory."""
    from pipeline.data.export import export_tokens

    written = export_tokens(path, out, count, split, image_tokenizer, text_tokenizer)
    click.echo(f"{written} images and their captions are in {out}; all of them: {out / 'sheet.png'}")
