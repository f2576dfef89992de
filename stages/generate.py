"""Stage 6, generate: generate the prompts for the eye, and captions of the train split for the metrics.

Reads prepare (captions), the three models, and the reranker where there is one, which then scores every image and
keeps the best of `generate.candidates`. Writes prompts/00.png ..., prompts.json and the grid
prompts.png, then samples/000000.tar ... (KEY.png, KEY.txt, KEY.json; KEY is that of the caption's own
image), a shard at a time: after a stop or a crash the finished ones stay. Array tasks share these
shards, and the stage itself, after them, adds the prompts. See pipeline/sampling/.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from PIL import Image

from pipeline.cli.stage import run_stage
from pipeline.core import distributed, signals
from pipeline.core.atomic_io import write_json
from pipeline.core.progress import progress
from pipeline.data.shards import Sample, read_samples, write_shard
from pipeline.orchestration.stage_run import StageRun
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.pipeline import GeneratedImage, Pipeline
from pipeline.sampling.prompts import check_against_training, sampled_rows
from pipeline.sampling.save import save_image

_NOTES = {
    "training": "Captions of training images: a small model mostly generates those images again.",
    "new": "Prompts that training never saw: new combinations of known words.",
}


def main(run: StageRun) -> None:
    if not distributed.is_main():
        return
    config = run.config.generate
    captions = [(sample.key, sample.caption) for sample in read_samples(run.input("prepare"), "train")]
    check_against_training(config, [caption for _, caption in captions])
    chosen = [captions[row] for row in sampled_rows(len(captions), config.samples, run.config.seed)]
    pipeline = Pipeline.from_pretrained(run.input("transformer").parent, distributed.device())
    if run.array_task is None:
        _generate_prompts(run, pipeline)
    _generate_samples(run, pipeline, chosen)


def _generate_prompts(run: StageRun, pipeline: Pipeline) -> None:
    config = run.config.generate
    entries = [(prompt, "training") for prompt in config.training_prompts]
    entries += [(prompt, "new") for prompt in config.new_prompts]
    if not entries:
        return
    generated = _generate(run, pipeline, [prompt for prompt, _ in entries])
    images = [one.image for one in generated]
    listed = []
    for number, ((prompt, kind), one) in enumerate(zip(entries, generated, strict=True)):
        file = f"prompts/{number:02d}.png"
        listed.append({"prompt": prompt, "kind": kind, "file": file} | _score(one))
        about = {"prompt": prompt, "seed": run.seed, "sampling": config.sampling.model_dump(mode="json")}
        _save(run, one.image, file, about | _drawn(pipeline, one))
    write_json(run.directory / "prompts.json", listed)
    run.add_output("prompts.json")
    groups = []
    for kind, title in (("training", "Training captions"), ("new", "New prompts")):
        pairs = zip(entries, images, strict=True)
        tiles = [Tile(image, prompt) for (prompt, its_kind), image in pairs if its_kind == kind]
        if tiles:
            groups.append(Group(title, tiles, _NOTES[kind]))
    sheet = grid(groups)
    _save(run, sheet, "prompts.png")
    run.tracker.log_image("prompts", sheet, 0)


def _generate_samples(run: StageRun, pipeline: Pipeline, chosen: list[tuple[str, str]]) -> None:
    config = run.config.generate
    tokens = pipeline.transformer.layout.image_length * config.candidates  # an image
    bar = progress(total=len(chosen) * tokens, description="generate", unit="token")
    for start in run.my_share(range(0, len(chosen), config.shard_size)):
        part = chosen[start : start + config.shard_size]
        path = run.directory / "samples" / f"{start // config.shard_size:06d}.tar"
        if path.exists():
            bar.update(len(part) * tokens)
        else:
            signals.check()
            generated = _generate(run, pipeline, [caption for _, caption in part], start, bar.update)
            write_shard(path, [_sample(*pair, pipeline, one) for pair, one in zip(part, generated, strict=True)])
        run.add_output(path)
        run.add_output(path.with_suffix(".index.npy"))
    bar.close()


def _generate(
    run: StageRun,
    pipeline: Pipeline,
    prompts: list[str],
    first: int = 0,
    on_tokens: Callable[[int], object] | None = None,
) -> list[GeneratedImage]:
    """An image a prompt: where there is a reranker, the one of the candidates that it likes best."""
    config = run.config.generate
    return pipeline.generate(
        *(prompts, config.candidates, run.seed, config.sampling),
        keep=1 if pipeline.ranker is not None else None,
        batch_size=config.batch_size,
        first_prompt=first,
        compiled=config.compile,
        on_tokens=on_tokens,
    )


def _sample(key: str, caption: str, pipeline: Pipeline, one: GeneratedImage) -> Sample:
    content = io.BytesIO()
    one.image.save(content, format="png")
    about = {"key": key, "caption": caption, "generated": True} | _drawn(pipeline, one)
    return Sample(key, content.getvalue(), caption, about)


def _drawn(pipeline: Pipeline, one: GeneratedImage) -> dict[str, Any]:
    return {"prompt_number": one.prompt, "candidate": one.candidate, "model": pipeline.source.model_hash} | _score(one)


def _score(one: GeneratedImage) -> dict[str, float]:
    return {} if one.score is None else {"score": round(one.score, 4)}


def _save(run: StageRun, image: Image.Image, name: str, about: dict[str, Any] | None = None) -> None:
    save_image(image, run.directory / name, about or {})
    run.add_output(name)


if __name__ == "__main__":
    run_stage("generate", main)
