"""Stage text-tokenizer: learn a byte-pair encoding from the captions of the training split, or list their classes.

Reads the captions of prepare/train: all, or a sample of `max_captions`; of classes all. Writes tokenizer.json and
config.json (`TextTokenizer.from_pretrained` loads them) and stats.json, of these captions: how many, vocabulary, tokens
per caption, share that the window cuts.
"""

from __future__ import annotations

import logging

from pipeline.cli.stage import run_stage
from pipeline.core.atomic_io import write_json
from pipeline.core.distributed import is_main
from pipeline.core.iteration import batched
from pipeline.core.progress import progress
from pipeline.data.catalog import Catalog
from pipeline.orchestration.stage_run import StageRun
from pipeline.sampling.prompts import check_against_training, sampled_rows
from pipeline.text_tokenizer import TextTokenizer

log = logging.getLogger(__name__)

_ENCODED = 10_000  # captions at a time


def main(run: StageRun) -> None:
    """Run the stage in `run`; rank 0 does the work."""
    if not is_main():
        return
    catalog = Catalog(run.input("prepare"), "train")
    # Nothing but captions decides this, and generate, which needs it, comes hours later.
    check_against_training(run.config.generate, catalog)
    sampled_rows(len(catalog), run.config.generate.samples, run.seed)
    of_classes = run.config.transformer.condition == "class"
    count = catalog.caption_count if of_classes else min(catalog.caption_count, run.config.text_tokenizer.max_captions)
    if count < catalog.caption_count:
        log.info("text tokenizer: %d of %d captions are read (max_captions)", count, catalog.caption_count)
    chosen = catalog.caption_sample(count, run.config.seed)
    captions = list(progress(chosen, total=count, description="captions", unit="caption"))
    make = TextTokenizer.of_classes if of_classes else TextTokenizer.train
    tokenizer = make(captions, run.config.text_tokenizer)
    stats = statistics(tokenizer, captions)
    log.info("text tokenizer: %s", ", ".join(f"{name} {value:g}" for name, value in stats.items()))
    run.tracker.log(stats, 0)
    tokenizer.save_pretrained(run.directory)
    write_json(run.directory / "stats.json", stats)
    for name in ("tokenizer.json", "config.json", "stats.json"):
        run.add_output(name, artifact=True)


def statistics(tokenizer: TextTokenizer, captions: list[str]) -> dict[str, float]:
    """The metrics in stats.json, by name."""
    # In pieces: an encoding takes more memory than its caption by far.
    counts = sorted(count for some in batched(captions, _ENCODED) for count in tokenizer.token_counts(some))
    cut = sum(count > tokenizer.text_length for count in counts)
    return {
        "captions": float(len(captions)),
        "vocab_size": float(tokenizer.vocab_size),
        "tokens_per_caption/mean": sum(counts) / len(counts),
        "tokens_per_caption/p99": float(counts[int(0.99 * (len(counts) - 1))]),
        "tokens_per_caption/max": float(counts[-1]),
        "captions_cut": float(cut),
        "captions_cut_share": cut / len(counts),
    }


if __name__ == "__main__":
    run_stage("text-tokenizer", main)
