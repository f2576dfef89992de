"""What it costs to find near-duplicates among the hashes of many images: time, peak memory.

    python -m benchmarks.near_duplicates find 100000 --brute-force
    python -m benchmarks.near_duplicates find 1000000 10000000
    python -m benchmarks.near_duplicates find 100000000 --kinds images

Each measurement is a process of its own, and so is what makes the hashes. They lie in files of 10,000, as parts of
`prepare` leave them, below TMPDIR, and so does what is compared. CPU time says what the work is, on a machine with
other work, too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from benchmarks.scale import MARK, PER_SHARD, peak_kb
from pipeline.data.duplicates import same_image

_MADE_TOGETHER = 1_000_000


@click.group()
def main() -> None:
    """Measure at several numbers of images."""


@main.command("find")
@click.argument("sizes", type=int, nargs=-1, required=True)
@click.option("--bits", default=3, show_default=True)
@click.option("--kinds", default="chance,images", show_default=True)
@click.option("--brute-force", is_flag=True, help="compare all pairs, too, and the results")
def find(sizes: tuple[int, ...], bits: int, kinds: str, brute_force: bool) -> None:
    """Find near-duplicates among SIZES hashes: of chance, and distributed as those of images with flat colours."""
    print("| hashes | samples | CPU s | wall s | near-duplicates | peak MB |\n|---|---|---|---|---|---|")
    for samples, kind in product(sizes, kinds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.near_duplicates"]
            subprocess.run([*command, "make", folder, kind, str(samples)], check=True)
            near = [*command, "near", folder, kind, str(bits), *["--brute-force"] * brute_force]
            done = subprocess.run(near, check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout.split(MARK)[1].strip(), flush=True)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("kind")
@click.argument("samples", type=int)
def make(folder: Path, kind: str, samples: int) -> None:
    """Write the hashes of SAMPLES as parts of `prepare` leave them; each twentieth sample is a copy of another."""
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 1 << 35, 20_000, np.uint64)
    first: NDArray[np.uint64] = np.empty(0, np.uint64)
    for begin in range(0, samples, _MADE_TOGETHER):
        count = min(_MADE_TOGETHER, samples - begin)
        found = rng.integers(0, 1 << 64, count, np.uint64) if kind == "chance" else _image_hashes(count, drawings, rng)
        first = first if len(first) else found.copy()
        copies = rng.permutation(count)[: count // 20]
        found[copies] = first[rng.integers(0, len(first), len(copies))]
        for _ in range(4):  # up to four bits differ
            found[copies] ^= np.uint64(1) << rng.integers(0, 64, len(copies), np.uint64)
        for start in range(0, count, PER_SHARD):
            own = found[start : start + PER_SHARD]
            np.save(folder / f"{begin + start:010d}.npy", np.stack([own, own], axis=1))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("kind")
@click.argument("bits", type=int)
@click.option("--brute-force", is_flag=True)
def near(folder: Path, kind: str, bits: int, brute_force: bool) -> None:
    """One measurement of `find`, in this process."""
    paths = sorted(folder.glob("*.npy"))
    samples = sum(len(np.load(path, mmap_mode="r")) for path in paths)
    wall, cpu = time.perf_counter(), time.process_time()
    found = same_image(paths, bits, np.zeros(samples, bool))
    seconds = f"{time.process_time() - cpu:,.1f} | {time.perf_counter() - wall:,.1f}"
    peak = peak_kb() / 1e3
    if brute_force:
        every = np.concatenate([np.load(path)[:, 1] for path in paths])
        assert found.tolist() == [_has_near(every[n], every[:n], bits) for n in range(samples)]
    print(f"{MARK}| {kind} | {samples:,} | {seconds} | {found.sum():,} | {peak:,.0f} |")


def _has_near(own: np.uint64, others: NDArray[np.uint64], bits: int) -> bool:
    return bool((np.bitwise_count(others ^ own) <= bits).any())


def _image_hashes(samples: int, templates: NDArray[np.uint64], rng: np.random.Generator) -> NDArray[np.uint64]:
    """As `perceptual_hash` makes them (35 bits of luma, 2 x 14 of chroma) of photographs, drawings and flat images.

    Two fifths are photographs; two fifths drawings on white without colour, each like one of `templates`; a fifth is
    almost flat: any colour, and ten bits of luma that noise decides.
    """
    kinds = rng.choice(3, samples, p=[0.4, 0.4, 0.2])
    photographs = rng.integers(0, 1 << 35, samples, np.uint64)
    drawings = templates[rng.integers(0, len(templates), samples)]
    for bit in range(35):
        drawings ^= (rng.random(samples) < 0.08).astype(np.uint64) << np.uint64(bit)
    luma = np.choose(kinds, [photographs, drawings, rng.integers(0, 1 << 10, samples, np.uint64)])
    hashes = luma << np.uint64(29)
    for shift in (15, 1):
        levels = np.clip(np.rint(rng.normal(7, 2, samples)), 0, 14).astype(np.uint64)
        levels = np.choose(kinds, [levels, np.full(samples, 7, np.uint64), rng.integers(0, 15, samples, np.uint64)])
        hashes |= ((np.uint64(1) << levels) - np.uint64(1)) << np.uint64(shift)
    return hashes


if __name__ == "__main__":
    main()
