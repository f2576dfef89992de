"""Stage 4, tokenize: image shards -> token arrays.

Reads prepare's shards and both tokenizers. Writes for every shard the codes of each level, text ids and keys
(train/, val/), and index.json with checksums. Array tasks share the shards; a finished one is verified, not made
again. The index is made by the stage itself, after the tasks.
See pipeline/data/tokenize_shards.py.
"""

from __future__ import annotations

import logging
from contextlib import closing

from pipeline.cli.stage import run_stage
from pipeline.core import distributed, signals
from pipeline.core.progress import progress
from pipeline.data.tokenize_shards import Encoders, all_shards, join, tokenize_shards, tokenizer_hashes
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun
from pipeline.text_tokenizer.bpe import TextTokenizer

log = logging.getLogger(__name__)
_COUNTS = ("samples", "captions_cut")


def load_encoders(run: StageRun) -> Encoders:
    image_dir, text_dir = run.input("image-tokenizer") / "model", run.input("text-tokenizer")
    image_tokenizer = ImageTokenizer.from_pretrained(image_dir).to(distributed.device()).eval()
    text_tokenizer = TextTokenizer.from_pretrained(text_dir)
    return Encoders(
        encode_images=image_tokenizer.encode,
        encode_text=text_tokenizer.encode,
        levels=image_tokenizer.levels,
        text_length=text_tokenizer.text_length,
        text_vocab_size=text_tokenizer.vocab_size,
        hashes=tokenizer_hashes(image_dir, text_dir),
        device=str(distributed.device()),
        count_text=text_tokenizer.token_counts,
    )


def main(run: StageRun) -> None:
    config, prepare_dir = run.config.tokenize, run.input("prepare")
    encoders = load_encoders(run)
    mine = run.my_share(all_shards(prepare_dir))
    with closing(tokenize_shards(run.directory, prepare_dir, mine, encoders, config, run.seed)) as made:
        for _ in progress(made, total=len(mine), description="tokenize", unit="shard"):
            signals.check()
    if run.array_task is None:
        index = join(run.directory, prepare_dir, encoders, config, run.seed)
        for split_index in index["splits"].values():
            for entry in split_index["shards"]:
                for name, sha256 in entry["sha256"].items():
                    run.add_output(name, sha256=sha256)
        run.add_output("index.json")
        splits = index["splits"].items()
        metrics = {f"{split}_{name}": float(found[name]) for split, found in splits for name in _COUNTS}
        run.tracker.log(metrics, step=0)
        for split, found in splits:
            log.info(
                "%s: %d of %d captions are longer than the window of %d tokens and were cut",
                *(split, found["captions_cut"], found["samples"], encoders.text_length),
            )


if __name__ == "__main__":
    run_stage("tokenize", main)
