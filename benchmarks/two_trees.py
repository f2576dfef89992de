"""The speed of this tree beside another's, by turns in one run: what proves that a refactoring costs nothing.

    git worktree add --detach /tmp/before COMMIT
    python -m benchmarks.two_trees /tmp/before                    # all of the works below
    python -m benchmarks.two_trees /tmp/before decode-1 --same    # the other beside itself: what chance does

Each tree does its work in a process of its own, of one thread, and they take turns, a different one first each time.
Ratios are of CPU time: of the medians of all turns, and of each one's fastest. The other tree must have the API that
the works use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, cast

import click

HERE = Path(__file__).parents[1]
Work = Callable[[], object]


def works() -> dict[str, Work]:
    """Of the tree that `pipeline` is imported from."""
    import torch

    from pipeline.config.generate import SamplingConfig
    from pipeline.config.transformer import TransformerConfig, TransformerShape
    from pipeline.image_tokenizer.base import build
    from pipeline.sampling.decode import candidate_uniforms, draw_codes
    from pipeline.transformer.layout import Layout
    from pipeline.transformer.model import Transformer
    from pipeline.transformer.objective import JointObjective

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(Layout.of(32, 2000, [(16, 16, 1024)]), TransformerShape(layers=6, width=256, heads=8))
    torch.nn.init.normal_(model.head.weight)  # zero at the start, and all codes alike
    text, codes = torch.randint(1, 2000, (8, 32)), torch.randint(0, 1024, (4, 256))
    uniforms = torch.stack([candidate_uniforms(0, index, 0, 256) for index in range(8)])
    objective = JointObjective(model, TransformerConfig())
    tokenizer = build({"kind": "vqvae"}, 64)
    tokenizer_objective = tokenizer.objective()
    images = torch.rand(4, 3, 64, 64)

    def decode(batch: int) -> None:
        with torch.inference_mode():
            draw_codes(model.eval(), text[:batch], torch.arange(batch), uniforms[:batch], SamplingConfig())

    def step(precision: torch.dtype) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            loss, _ = objective.train()({"text": text[:4], "codes": codes}, 0)
        loss.backward()

    def tokenizer_step() -> None:
        loss, _ = tokenizer_objective.train()({"images": images}, 0)
        loss.backward()

    def tokenize() -> None:
        with torch.inference_mode():
            tokenizer.eval().encode(images)

    return {
        "decode-1": partial(decode, 1),
        "decode-8": partial(decode, 8),
        "step-float32": partial(step, torch.float32),
        "step-bfloat16": partial(step, torch.bfloat16),
        "tokenizer-step": tokenizer_step,
        "tokenize": tokenize,
    }


class Tree:
    """A process that does the works of one tree when asked."""

    def __init__(self, folder: Path) -> None:
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        command = [sys.executable, "-P", __file__, "--work", str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=folder
        )
        self.names = self._answer().split()

    def seconds(self, name: str) -> float:
        stdin = cast(IO[str], self._process.stdin)
        stdin.write(f"{name}\n")
        stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise click.ClickException("a tree's process ended: its error is above")
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def do_works(folder: str) -> None:
    """Answer each name on standard input with the seconds of CPU that its work took."""
    sys.path.insert(0, folder)
    import pipeline

    assert Path(next(iter(pipeline.__path__))).parent == Path(folder), (
        f"not the pipeline of {folder}: {pipeline.__path__}"
    )
    known = works()
    print(*known, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        known[line.strip()]()
        print(time.process_time() - start, flush=True)


@click.command()
@click.argument("before", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1)
@click.option("--turns", default=20, show_default=True)
@click.option("--same", is_flag=True, help="the other tree a second time in our place")
def main(before: Path, names: tuple[str, ...], turns: int, same: bool) -> None:
    """Compare this tree with that in BEFORE, at all works or at NAMES."""
    trees = [Tree(before.resolve()), Tree(before.resolve() if same else HERE)]
    print("work             before, ms     now, ms   now/before: median   fastest")
    for name in names or trees[0].names:
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                times[which].append(trees[which].seconds(name))
        old, new = (t[1:] for t in times)  # the first warms up
        ratios = median(new) / median(old), min(new) / min(old)
        print(f"{name:15} {1000 * median(old):11.1f} {1000 * median(new):11.1f} {ratios[0]:20.3f} {ratios[1]:9.3f}")
    for tree in trees:
        tree.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        do_works(sys.argv[2])
    else:
        main()
