"""What the indexes of many shards cost: their bytes, opening them, looking whether the files are there.

    python -m benchmarks.indexes runs/indexes 10000 100000

Image shards are empty files, token arrays files of zeros. CPU time says what the work is, on a machine with other work,
too. Each row is a process of its own, with its imports before.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import psutil

from benchmarks.hollow_arrays import hollow_arrays
from pipeline.core.manifest import first_fault, record
from pipeline.data.shard_table import ShardEntry
from pipeline.data.shards import PrepareIndex, SplitIndex, index_path, read_index, read_shards, write_index
from pipeline.data.tokens import TokenArrays

SAMPLES = 1_000  # of a shard
READ = 4_096  # samples from everywhere


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("shards", type=int, nargs=-1, required=True)
@click.option("--row", is_flag=True, help="one row of the table, of what lies in FOLDER")
def main(folder: Path, shards: tuple[int, ...], row: bool) -> None:
    """Make indexes of SHARDS shards below FOLDER, unless they are there, and measure them."""
    if row:
        print(_row(folder / str(shards[0]), shards[0]))
        return
    print("| shards | index | open | files there? | token records | open | map all, read 4,096 samples | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for count in shards:
        if not (folder / str(count) / "tokens" / "index.json").is_file():
            _make(folder / str(count), count)
        command = [sys.executable, "-m", "benchmarks.indexes", "--row", str(folder), str(count)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def _make(folder: Path, count: int) -> None:
    prepared, entries = folder / "prepare", list[ShardEntry]()
    (prepared / "train").mkdir(parents=True)
    for number in range(count):
        name, sha256 = f"train/{number:06d}.tar", hashlib.sha256(str(number).encode()).hexdigest()
        entries.append({"name": name, "samples": SAMPLES, "bytes": SAMPLES * 100_000, "sha256": sha256})
        (prepared / name).touch()
        index_path(prepared / name).touch()
    train: SplitIndex = {"samples": SAMPLES * count, "bytes": 0, "captions": SAMPLES * count, "shards": entries}
    index: PrepareIndex = {
        "image_size": 64,
        "splits": {"train": train, "val": {"samples": 0, "bytes": 0, "shards": []}},
        "rejected": {"samples": 0, "reasons": {}},
        "conversions": {},
        "credit": None,
    }
    write_index(prepared, index)
    hollow_arrays(folder / "tokens", count, SAMPLES, text=8, side=8)


def _row(folder: Path, count: int) -> str:
    prepared, tokens = folder / "prepare", folder / "tokens"
    size = sum((prepared / name).stat().st_size for name in ("index.json", "train.shards", "val.shards"))
    resident = psutil.Process().memory_info().rss
    times = [time.process_time()]
    shards = read_shards(prepared, "train", read_index(prepared))
    assert shards.samples.sum() == count * shards[count // 2].samples
    times.append(time.process_time())
    recorded = {"train": record(prepared / "train")}
    times.append(time.process_time())
    assert first_fault(prepared, recorded, hashed=False) is None
    times.append(time.process_time())
    arrays = TokenArrays(tokens, "train")
    times.append(time.process_time())
    samples = np.linspace(0, len(arrays) - 1, READ).astype(np.int64)
    arrays.gather(samples, np.zeros(READ, np.int64))
    times.append(time.process_time())
    grown = (psutil.Process().memory_info().rss - resident) / 1e6
    opened, _, there, tokens_opened, read = np.diff(times)
    records = (tokens / "train.shards").stat().st_size
    cells = [f"{count:,}", f"{size / 1e6:.1f} MB", f"{opened:.3f} s", f"{there:.3f} s", f"{records / 1e6:.1f} MB"]
    return "| " + " | ".join([*cells, f"{tokens_opened:.3f} s", f"{read:.3f} s", f"{grown:.0f} MB"]) + " |"


if __name__ == "__main__":
    main()
