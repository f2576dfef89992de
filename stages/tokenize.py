"""Stage 4, tokenize: image shards -> token arrays.

Reads prepare's shards and both tokenizers. Writes for every shard the codes of each level, text ids and keys
(train/, val/), and index.json with checksums. Array tasks share the shards; a finished one is verified, not made
again. The index is made by the stage itself, after the tasks.
See pipeline/data/tokenizing.py.
"""

from __future__ import annotations

from contextlib import closing

from pipeline import distributed, stop
from pipeline.data.tokenizing import Encoders, all_shards, hash_of_files, join, tokenize_shards
from pipeline.data.tokens import Level
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.progress import progress
from pipeline.stage import StageRun, run_stage
from pipeline.text_tokenizer import TextTokenizer


def load_encoders(run: StageRun) -> Encoders:
    image_dir, text_dir = run.input("image-tokenizer") / "model", run.input("text-tokenizer")
    image_tokenizer = ImageTokenizer.from_pretrained(image_dir).to(distributed.device()).eval()
    text_tokenizer = TextTokenizer.from_pretrained(text_dir)
    return Encoders(
        encode_images=image_tokenizer.encode,
        encode_text=text_tokenizer.encode,
        levels=[Level(level.height, level.width, level.codebook_size) for level in image_tokenizer.levels],
        text_length=text_tokenizer.text_length,
        text_vocab_size=text_tokenizer.vocab_size,
        hashes={
            "image-tokenizer": hash_of_files(image_dir, ["config.json", "model.safetensors"]),
            "text-tokenizer": hash_of_files(text_dir, ["config.json", "tokenizer.json"]),
        },
        device=str(distributed.device()),
    )


def main(run: StageRun) -> None:
    config, prepare_dir = run.config.tokenize, run.input("prepare")
    encoders = load_encoders(run)
    mine = run.my_share(all_shards(prepare_dir))
    with closing(tokenize_shards(run.directory, prepare_dir, mine, encoders, config, run.seed)) as made:
        for _ in progress(made, total=len(mine), description="tokenize", unit="shard"):
            stop.check()
    if run.array_task is None:
        index = join(run.directory, prepare_dir, encoders, config, run.seed)
        for split_index in index["splits"].values():
            for entry in split_index["shards"]:
                for name, sha256 in entry["sha256"].items():
                    run.add_output(name, sha256=sha256)
        run.add_output("index.json")
        samples = {f"{split}_samples": float(found["samples"]) for split, found in index["splits"].items()}
        run.tracker.log(samples, step=0)


if __name__ == "__main__":
    run_stage("tokenize", main)
