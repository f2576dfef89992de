"""A run directory up to `tokenize`, in seconds: real shards, a real (untrained) dVAE, a real text tokenizer.

Also a program, a task of tokenize: python -m tests.data.small_run RUN OUT TASK TASKS CROPS FILES
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.config.prepare import PrepareConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.data import token_parts as parts_of_tokens
from pipeline.data.catalog import Catalog
from pipeline.data.prepare import prepare
from pipeline.data.token_parts import token_parts
from pipeline.data.tokenize_shards import Encoders, TokenizeJob, join, tokenize_shards, tokenizer_hashes
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.text_tokenizer import TextTokenizer
from tests.data.sample_images import folder_config, write_folder

MODEL = {
    "kind": "dvae",
    "codebook_size": 32,
    "code_width": 16,
    "patch_size": 2,
    "widths": [16],
    "blocks": 1,
    "block_kernels": [3, 1],
}


def make_small_run(
    directory: Path,
    samples: int,
    config: TokenizeConfig | None,
    seed: int = 0,
    model: dict[str, Any] = MODEL,
    prepare_config: PrepareConfig | None = None,
) -> Path:
    """`config` None: everything but tokenize. `prepare_config` None: a folder of `samples` images."""
    if prepare_config is None:
        folder = write_folder(directory / "in", samples)
        values = {"shard_size": 16, "image_size": 16, "validation_fraction": 0.1}
        prepare_config = folder_config(folder, **values)
    prepare(directory / "prepare", prepare_config, seed=0)
    torch.manual_seed(seed)
    build(model, prepare_config.image_size).save_pretrained(directory / "image-tokenizer/model")
    catalog = Catalog(directory / "prepare", "train")
    captions = list(catalog.caption_sample(catalog.caption_count, seed=0))
    text_tokenizer = TextTokenizer.train(captions, TextTokenizerConfig(vocab_size=300, text_length=24))
    text_tokenizer.save_pretrained(directory / "text-tokenizer")
    if config is not None:
        job = tokenize_job(directory, directory / "tokenize", config)
        list(tokenize_shards(job, token_parts(job.prepare_dir)))
        join(job)
    return directory


def tokenize_job(directory: Path, out: Path, config: TokenizeConfig) -> TokenizeJob:
    """The run's shards to token arrays in `out`."""
    return TokenizeJob(out, directory / "prepare", load_encoders(directory), config, seed=0)


def load_encoders(directory: Path) -> Encoders:
    image_dir, text_dir = directory / "image-tokenizer/model", directory / "text-tokenizer"
    images, text = ImageTokenizer.from_pretrained(image_dir), TextTokenizer.from_pretrained(text_dir)
    return Encoders(
        encode_images=images.encode,
        encode_text=text.encode,
        levels=images.levels,
        text_length=text.text_length,
        text_vocab_size=text.vocab_size,
        hashes=tokenizer_hashes(image_dir, text_dir),
    )


def run_task(directory: Path, out: Path, task: int, tasks: int, crops: int, files: int) -> None:
    """The share of one array task, written to `out`; at most `files` of a split."""
    parts_of_tokens.PARTS = files
    torch.set_num_threads(1)
    job = tokenize_job(directory, out, TokenizeConfig(crops=crops, batch_size=8))
    for _ in tokenize_shards(job, token_parts(job.prepare_dir)[task::tasks]):
        print("done", flush=True)


if __name__ == "__main__":
    run_task(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
