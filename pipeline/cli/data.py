"""`smalti data inspect`, `smalti data export` and `smalti data push`. Imports no torch until a command runs."""

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

    _read_stores_as_configured(path)
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

    _read_stores_as_configured(path)
    written = export_tokens(path, out, count, split, image_tokenizer, text_tokenizer)
    click.echo(f"{written} images and their captions are in {out}; all of them: {out / 'sheet.png'}")


@data.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("url")
@click.option("--remove", is_flag=True, help="remove the local files once all lie there")
def push(run: Path, url: str, remove: bool) -> None:
    """Send the image shards and token arrays of RUN to an object store, from where its stages read them then.

    URL: a folder of the store, as s3://bucket/my-run. What lies there already is not sent again.
    """
    from pipeline.core.credentials import take_password_out
    from pipeline.data.pushed import push as push_run

    _read_stores_as_configured(run)
    for line in push_run(run, take_password_out(url), remove):
        click.echo(line)


def _read_stores_as_configured(path: Path) -> None:
    """By the section `store` of the run that `path` is or lies in, if it is one."""
    from pipeline.config.pipeline import is_run_config, load_pipeline
    from pipeline.data.remote_file import configure

    if found := [folder for folder in (path, path.parent) if is_run_config(folder / "config.yaml")]:
        configure(load_pipeline(found[0]).store)
