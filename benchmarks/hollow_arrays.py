"""Token arrays of zeros that take no room on the disk, to see what a size costs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pipeline.core.atomic_io import write_json
from pipeline.core.level import Level
from pipeline.data.token_blocks import RECORD, Shape
from pipeline.data.token_parts import PARTS, part_name
from pipeline.data.tokens import FORMAT, TokenIndex, write_records


def hollow_arrays(folder: Path, shard_count: int, samples: int, text: int, side: int) -> Path:
    """A split "train" of so many shards of so many samples: captions of `text` tokens, `side` x `side` codes."""
    files = min(shard_count, PARTS)
    records = np.zeros(shard_count, RECORD)
    records["samples"] = records["captions"] = samples
    records["part"] = np.arange(shard_count) * files // shard_count
    records["bytes"] = Shape(text, 2048, (Level(side, side, 1024),), 1).sections(records)["end"]
    (folder / "train").mkdir(parents=True)
    for number in range(files):
        own = np.flatnonzero(records["part"] == number)
        ends = np.cumsum(records["bytes"][own])
        records["begin"][own] = ends - records["bytes"][own]
        (folder / part_name("train", number)).touch()
        os.truncate(folder / part_name("train", number), int(ends[-1]))
    index: TokenIndex = {
        "format": FORMAT,
        "levels": [{"height": side, "width": side, "codebook_size": 1024}],
        "text_length": text,
        "text_vocab_size": 2048,
        "tokenizers": {},
        "splits": {"train": write_records(folder, "train", [records], crops=1)},
    }
    write_json(folder / "index.json", index)
    return folder
