"""The stage image-tokenizer, which writes which sample it draws at which position, a file a process, to DRAWN_LOG."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.cli.stage import run_stage
from pipeline.data.mixture import Mixture
from pipeline.data.order import Ints
from stages.image_tokenizer import main

_locate = Mixture.locate


def _and_write(self: Mixture, positions: Ints) -> tuple[Ints, Ints]:
    samples, epochs = _locate(self, positions)
    with open(Path(os.environ["DRAWN_LOG"]) / f"{os.getpid()}.jsonl", "a") as file:
        print(json.dumps([positions.tolist(), samples.tolist()]), file=file)
    return samples, epochs


if __name__ == "__main__":
    Mixture.locate = _and_write  # type: ignore[method-assign]
    run_stage("image-tokenizer", main)
