"""Stage tokenize: image shards -> token arrays.

Reads prepare's shards and both tokenizers. Writes for every shard the codes of each level, text ids and keys, those of
many shards in one file (train/, val/), and index.json with checksums. Array tasks share these files; what is finished
is verified, not made again. The stage itself, after the tasks, makes the index.
See pipeline/data/tokenize_shards.py.
"""

from __future__ import annotations

if __name__ == "tokenize":  # a stage was started by its file: what asks for the standard library's tokenize finds this
    raise SystemExit("error: stages are modules: run `python -m stages.NAME` (or `python -P stages/NAME.py`)")

import logging
from contextlib import closing

from pipeline.cli.stage import run_stage
from pipeline.core import distributed, signals
from pipeline.core.arithmetic import set_arithmetic
from pipeline.core.progress import progress
from pipeline.data.token_parts import token_parts
from pipeline.data.tokenize_shards import Encoders, TokenizeJob, join, tokenize_shards, tokenizer_hashes
from pipeline.data.tokens import records_path
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun
from pipeline.text_tokenizer import TextTokenizer

log = logging.getLogger(__name__)


def load_encoders(run: StageRun) -> Encoders:
    """The run's two tokenizers."""
    image_dir, text_dir = run.input("image-tokenizer") / "model", run.input("text-tokenizer")
    set_arithmetic(tf32=False, deterministic=False)  # on GPUs convolutions would use TF32, and move some codes
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
    """Run the stage, or an array task of it, in `run`."""
    job = TokenizeJob(run.directory, run.input("prepare"), load_encoders(run), run.config.tokenize, run.seed)
    mine = run.my_share(token_parts(job.prepare_dir))
    count = sum(len(part.shards) for part in mine)
    with closing(tokenize_shards(job, mine)) as made:
        for done, _ in enumerate(progress(made, total=count, description="tokenize", unit="shard"), start=1):
            run.pieces_done(done)
            signals.check()
    if run.array_task is None:
        _join(run, job)


def _join(run: StageRun, job: TokenizeJob) -> None:
    """Write the index, list the outputs, and log how many captions the window cut."""
    index = join(job)
    for split, found in index["splits"].items():
        run.add_output(records_path(run.directory, split), sha256=found["sha256"])
        if found["shards"]:
            run.add_output(split)
        log.info(
            "%s: %d of %d captions are longer than the window of %d tokens and were cut",
            split,
            found["captions_cut"],
            found["captions"],
            job.encoders.text_length,
        )
    log.info("codes were made in %s, without TF32", index.get("precision"))
    run.add_output("index.json", artifact=True)
    metrics: dict[str, float] = {}
    for split, found in index["splits"].items():
        metrics[f"{split}_samples"] = float(found["samples"])
        metrics[f"{split}_captions_cut"] = float(found["captions_cut"])
    run.tracker.log(metrics, step=0)


if __name__ == "__main__":
    run_stage("tokenize", main)
