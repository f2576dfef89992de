"""Token arrays -> images and captions, for a look at what the transformer learns from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes, to_pil
from pipeline.data.images import grid
from pipeline.data.tokenize_shards import hash_of_files
from pipeline.data.tokens import TokenArrays, read_token_index
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.text_tokenizer import TextTokenizer

_BATCH = 64


def export_tokens(
    path: Path, out: Path, count: int, split: str, image_tokenizer: Path | None, text_tokenizer: Path | None
) -> int:
    """Write KEY.png (KEY.crop-1.png, ...) and KEY.txt of `count` samples from everywhere in the split; and sheet.png.

    Args:
        path: a run, or its tokenize directory.
        image_tokenizer, text_tokenizer: directories; by default those of the same run.

    Returns:
        How many images were written.

    Raises:
        UserError: there are no token arrays, they are damaged, or they were made by other tokenizers.
    """
    directory = path / "tokenize" if (path / "tokenize").is_dir() else path
    arrays = TokenArrays(directory, split)
    image_dir = image_tokenizer or directory.parent / "image-tokenizer" / "model"
    text_dir = text_tokenizer or directory.parent / "text-tokenizer"
    images_of, captions_of = ImageTokenizer.from_pretrained(image_dir), TextTokenizer.from_pretrained(text_dir)
    _check(directory, "image-tokenizer", image_dir, ["config.json", "model.safetensors"])
    _check(directory, "text-tokenizer", text_dir, ["config.json", "tokenizer.json"])
    samples = np.unique(np.linspace(0, len(arrays) - 1, min(count, len(arrays))).astype(np.int64))
    arrays.verify(np.unique(arrays.shard_of(samples)).tolist())
    numbers = np.repeat(samples, arrays.crops)
    crops = np.tile(np.arange(arrays.crops), len(samples))
    shown = []
    for start in range(0, len(numbers), _BATCH):
        here = slice(start, start + _BATCH)
        text, codes = arrays.gather(numbers[here], crops[here])
        images = _decoded(images_of, torch.from_numpy(codes).long(), arrays)
        for row, (number, crop) in enumerate(zip(numbers[here].tolist(), crops[here].tolist(), strict=True)):
            key = arrays.keys(np.array([number]))[0]
            name = f"{key}.crop-{crop}.png" if crop else f"{key}.png"
            write_atomic(out / name, png_bytes(images[row]))
            if not crop:
                write_atomic(out / f"{key}.txt", captions_of.decode(text[row]) + "\n")
            shown.append(images[row])
    write_atomic(out / "sheet.png", png_bytes(grid(shown, max(arrays.crops, round(len(shown) ** 0.5)))))
    return len(shown)


def _check(tokenize_dir: Path, name: str, directory: Path, files: list[str]) -> None:
    expected = read_token_index(tokenize_dir)["tokenizers"][name]
    if hash_of_files(directory, files) != expected:
        raise UserError(f"{tokenize_dir} was made by another {name} than {directory}: give its own with --{name}")


def _decoded(tokenizer: ImageTokenizer, codes: torch.Tensor, arrays: TokenArrays) -> list[Image.Image]:
    levels = torch.split(codes, [level.positions for level in arrays.levels], dim=1)
    with torch.no_grad():
        return to_pil(tokenizer.decode(list(levels)))
