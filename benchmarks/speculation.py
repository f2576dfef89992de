"""What speculation saves: passes and CPU time of an image, and whether its codes are those of one-by-one drawing.

    python -m benchmarks.speculation images RUN --images 1000      # a finished run, its captions
    python -m benchmarks.speculation cost --layers 24 --width 1024 # of a pass by its codes; random weights

One thread, one image at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.transformer import TransformerShape
from pipeline.evaluation.image_sets import images_at
from pipeline.sampling import speculate
from pipeline.sampling.cached_step import CachedDecoder
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.sampling.pipeline import Pipeline
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer


@click.group()
def main() -> None:
    torch.set_num_threads(1)


@main.command()
@click.argument("run", type=click.Path(exists=True, path_type=Path))
@click.option("--images", "count", default=100, show_default=True)
@click.option("--split", default="train", show_default=True)
@click.option("--window", "windows", type=int, multiple=True, default=(4, 8, 16), show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
def images(run: Path, count: int, split: str, windows: tuple[int, ...], temperature: float, top_p: float) -> None:
    """Images of a run's captions, drawn one by one and by each window, in turns."""
    pipeline = Pipeline.from_pretrained(run)
    model = pipeline.transformer
    text_PT = torch.as_tensor(pipeline.text_tokenizer.encode(list(islice(_captions(run, split), count))))
    settings = {"temperature": temperature, "top_p": top_p}
    seconds: dict[int | None, float] = dict.fromkeys((None, *windows), 0.0)
    counted = dict.fromkeys(windows, 0)
    other = dict.fromkeys(windows, 0)
    for number, text_T in enumerate(text_PT):
        uniforms = candidate_uniforms(0, number, 0, model.layout.image_length)[None]
        found: dict[int | None, Tensor] = {}
        for window in seconds:
            own = SamplingConfig(speculate=window, **settings)
            start = time.process_time()
            told: list[int] = []  # a number for the first code, which the prompt gives, and for each pass
            one = torch.zeros(1, dtype=torch.int64)
            found[window] = draw_codes(
                model, text_T[None], one, uniforms, own, on_code=lambda there, _, told=told: told.append(there)
            )
            seconds[window] += time.process_time() - start
            if window is not None:
                counted[window] += len(told) - 1
                other[window] += not torch.equal(found[window], found[None])
    one_by_one = len(text_PT) * (model.layout.image_length - 1)
    for window in windows:
        share, faster = counted[window] / one_by_one, seconds[None] / seconds[window]
        wrong = f"{other[window]} of {len(text_PT)} images with other codes"
        print(f"window {window:2}: {share:.3f} x the passes, {faster:.2f} x the speed, {wrong}")


@main.command()
@click.option("--layers", default=24, show_default=True)
@click.option("--width", default=1024, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def cost(layers: int, width: int, rounds: int) -> None:
    """A pass of some codes beside one step of one code, in turns; at code 128 of 256."""
    shape = TransformerShape(layers=layers, width=width, heads=width // 64)
    model = Transformer(Layout.of(32, 2048, [(16, 16, 8192)]), shape).eval()
    cache = model.new_cache(1)
    for own in cache:
        own.keys.normal_()
        own.values.normal_()
    one, window = CachedDecoder(model, cache), speculate.CachedWindowStep(model, cache)
    codes = torch.randint(0, 8192, (32,))
    seconds: dict[int, list[float]] = {n: [] for n in (1, 2, 4, 8, 16, 32)}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for n, times in seconds.items():
                start = time.process_time()
                if n == 1:
                    one.logits(one.read(codes[:1], 128), 129)
                else:
                    window.logits(window.read(codes[:n], 128), 0)
                if turn:
                    times.append(time.process_time() - start)
    for n, times in seconds.items():
        print(f"{n:2} codes: {1000 * median(times):7.1f} ms, {median(times) / median(seconds[1]):.2f} x one step")


def _captions(run: Path, split: str) -> Iterator[str]:
    for tar in sorted((run / "prepare").rglob("*.tar")):
        if split in tar.relative_to(run).as_posix():
            yield from (image.caption or "" for image in images_at(tar))


if __name__ == "__main__":
    main()
