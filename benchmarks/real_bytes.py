"""Real images through prepare and tokenize in several ways, which must come to the same bytes.

    python -m benchmarks.real_bytes FOLDER IMAGES.tar … --samples 100000 --ways 1,2,4,slurm

The images of the tars are cut at random, resized to sides of 32 to 64 pixels and stored as JPEG and PNG by turns, in
tars below FOLDER. Each way is a run of its own there: with so many workers of `prepare` and processes of
`tokenize`, or on slurm/testbed with both as arrays of four tasks. The tokenizers, tiny and hardly trained, are made
once. Ends with an error where two ways differ in a byte of what they made.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image

from tests.conftest import NO_TRACKING, TINY
from tests.launch import launch
from tests.slurm.conftest import Slurm, cluster_file, start, stop, wait_until

SIDE = 32
STAGES = ("prepare", "tokenize")
TOKENIZERS = ("text-tokenizer", "image-tokenizer")
_MADE = ("index.json", "*.shards", "train/*", "val/*", "catalog/*")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--samples", default=100_000, show_default=True)
@click.option("--per-tar", default=1_000, show_default=True)
@click.option("--ways", default="1,2,4", show_default=True, help="numbers of processes, and slurm")
@click.option("--near-duplicates", is_flag=True, help="leave near-duplicates out, too")
def main(folder: Path, images: tuple[Path, ...], samples: int, per_tar: int, ways: str, near_duplicates: bool) -> None:
    """Make SAMPLES samples of IMAGES below FOLDER, unless they are there, and compare the ways."""
    if not (folder / "in").is_dir():
        _make(folder / "making", images, samples, per_tar)
        (folder / "making").rename(folder / "in")
    print(f"{samples:,} samples\n\n| | stage | seconds | bytes | SHA-256 of all files |\n|---|---|---|---|---|")
    found: dict[str, set[str]] = {stage: set() for stage in STAGES}
    more = ["prepare.filters.near_duplicate_bits=3", "prepare.max_rejected_fraction=1"] if near_duplicates else []
    first: Path | None = None
    for way in ways.split(","):
        for stage in STAGES:
            begun = time.perf_counter()
            _run_stage(folder, way, stage, samples, more)
            spent = time.perf_counter() - begun
            digest, size = _digest(folder / way / "tiny" / stage)
            found[stage].add(digest)
            print(f"| {way} | {stage} | {spent:.0f} | {size:,} | {digest[:16]} |", flush=True)
            if stage == "prepare":
                first = _tokenizers(folder, way, first, samples, more)
    if any(len(digests) > 1 for digests in found.values()):
        sys.exit("expected the same bytes in all ways, found others")


def _tokenizers(folder: Path, way: str, first: Path | None, samples: int, more: Sequence[str]) -> Path:
    """The tokenizers of a run: those of the first one, which are up to date if it has the same shards."""
    for stage in TOKENIZERS:
        if first is None:
            _run_stage(folder, way, stage, samples, more)
        elif not (folder / way / "tiny" / stage).exists():
            shutil.copytree(first / stage, folder / way / "tiny" / stage, copy_function=shutil.copy2)
    return first or folder / way / "tiny"


def _run_stage(folder: Path, way: str, stage: str, samples: int, more: Sequence[str]) -> None:
    overrides = [
        f"runs={folder / way}",
        f"prepare.source={{kind: webdataset, urls: '{folder}/in/*.tar'}}",
        f"prepare.image_size={SIDE}",
        "prepare.storage=webp",
        "image_tokenizer.model.patch_size=4",
        "generate.training_prompts=[]",
        NO_TRACKING,
        *more,
    ]
    if way == "slurm" and stage in STAGES:
        _submit(folder / way, stage, [str(TINY), *overrides, "--only", stage])
    else:
        count = 1 if way == "slurm" else int(way)
        own = {"prepare": [f"prepare.workers={count}"], "tokenize": [f"processes={count}"]}.get(stage, [])
        launch("pipeline", "run", str(TINY), *overrides, *own, "--only", stage)


def _submit(folder: Path, stage: str, arguments: list[str]) -> None:
    """As an array of four tasks on a testbed of its own."""
    folder.mkdir(exist_ok=True)
    slurm = start()
    try:
        cluster = cluster_file(folder, stages="{prepare: {array: 4}, tokenize: {array: 4}}")
        slurm.smalti("submit", *arguments, "--cluster", str(cluster))
        jobs = [entry["id"] for entry in json.loads((folder / "tiny" / "slurm" / "jobs.json").read_text())]
        wait_until("the last job's end", lambda: _ended(slurm, jobs[-1]), seconds=1800, run=folder / "tiny")
        if not (folder / "tiny" / stage / "_SUCCESS").exists():
            sys.exit("\n".join(f"{name}:\n{text}" for name, text in slurm.evidence()))
    finally:
        slurm("scancel", "--me")
        wait_until("the end of its jobs", lambda: not slurm("squeue", "-h").strip())
        stop(slurm)


def _ended(slurm: Slurm, job: int) -> bool:
    return slurm.states().get(job) not in ("PENDING", "RUNNING", "COMPLETING")  # Slurm forgets them after minutes


def _digest(directory: Path) -> tuple[str, int]:
    """Of the names and contents of all that a stage hands on, and their bytes."""
    digest, size = hashlib.sha256(), 0
    for path in sorted(path for pattern in _MADE for path in directory.glob(pattern)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory)} {hashlib.sha256(content).hexdigest()}\n".encode())
        size += len(content)
    return digest.hexdigest(), size


def _make(folder: Path, tars: Sequence[Path], samples: int, per_tar: int) -> None:
    """The source: parts of the tars' images, of many sizes, each with its caption."""
    folder.mkdir(parents=True)
    whole = list(_captioned(tars))
    rng = np.random.default_rng(0)
    for first in range(0, samples, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, samples)):
                image, caption = whole[number % len(whole)]
                side = int(rng.integers(min(image.size) * 3 // 4, min(image.size) + 1))
                left, top = rng.integers(0, [image.width - side + 1, image.height - side + 1]).tolist()
                made = image.resize((int(rng.integers(32, 65)),) * 2, box=(left, top, left + side, top + side))
                stored = io.BytesIO()
                if number % 2:
                    made.save(stored, "PNG", compress_level=1)
                else:
                    made.save(stored, "JPEG", quality=92)
                for extension, content in (("png" if number % 2 else "jpg", stored.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:07d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def _captioned(tars: Sequence[Path]) -> Iterator[tuple[Image.Image, bytes]]:
    for path in tars:
        with tarfile.open(path) as tar:
            found: dict[str, dict[str, bytes]] = {}
            for member in tar:
                if file := tar.extractfile(member):
                    key, _, extension = member.name.partition(".")
                    found.setdefault(key, {})[extension] = file.read()
        for files in found.values():
            content = files.get("png") or files["jpg"]
            yield Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")).convert("RGB"), files["txt"]


if __name__ == "__main__":
    main()
