"""Stage 6, generate: paint the prompts for the eye, and captions of the train split for the figures.

Reads prepare (captions) and the three models. Writes prompts/00.png ..., prompts.json and the grid
prompts.png, then samples/000000.tar ... (KEY.png, KEY.txt, KEY.json; KEY is that of the caption's own
picture), a shard at a time: after a stop or a crash the finished ones stay. Array tasks share these
shards, and the stage itself, after them, adds the prompts. See pipeline/sampling/.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from pipeline import distributed, stop
from pipeline.data.shards import Sample, read_samples, write_shard
from pipeline.errors import UserError
from pipeline.files import atomic_path, write_json
from pipeline.progress import progress
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.pipeline import Pipeline
from pipeline.sampling.prompts import check_against_training, sampled_rows
from pipeline.stage import StageRun, run_stage

_NOTES = {
    "training": "Captions of training pictures: a small model mostly paints those pictures again.",
    "new": "Prompts that training never saw: new combinations of known words.",
}


def main(run: StageRun) -> None:
    if not distributed.is_main():
        return
    config = run.config.generate
    if config.sampling.guidance > 1 and run.config.transformer.caption_dropout == 0:
        raise UserError("generate.sampling.guidance above 1 needs a transformer trained with caption_dropout above 0")
    captions = [(sample.key, sample.caption) for sample in read_samples(run.input("prepare"), "train")]
    check_against_training(config, [caption for _, caption in captions])
    chosen = [captions[row] for row in sampled_rows(len(captions), config.samples, run.config.seed)]
    pipeline = Pipeline.from_pretrained(run.input("transformer").parent, distributed.device())
    if run.array_task is None:
        _paint_prompts(run, pipeline)
    _paint_samples(run, pipeline, chosen)


def _paint_prompts(run: StageRun, pipeline: Pipeline) -> None:
    config = run.config.generate
    entries = [(prompt, "training") for prompt in config.training_prompts]
    entries += [(prompt, "new") for prompt in config.new_prompts]
    if not entries:
        return
    prompts = [prompt for prompt, _ in entries]
    pictures = pipeline.generate(prompts, 1, run.config.seed, config.sampling, batch_size=config.batch_size)
    listed = []
    for number, ((prompt, kind), picture) in enumerate(zip(entries, pictures, strict=True)):
        listed.append({"prompt": prompt, "kind": kind, "file": f"prompts/{number:02d}.png"})
        _save(run, picture, listed[-1]["file"])
    write_json(run.directory / "prompts.json", listed)
    run.add_output("prompts.json")
    groups = []
    for kind, title in (("training", "Training captions"), ("new", "New prompts")):
        pairs = zip(entries, pictures, strict=True)
        tiles = [Tile(picture, prompt) for (prompt, its_kind), picture in pairs if its_kind == kind]
        if tiles:
            groups.append(Group(title, tiles, _NOTES[kind]))
    sheet = grid(groups)
    _save(run, sheet, "prompts.png")
    run.tracker.picture("prompts", sheet, 0)


def _paint_samples(run: StageRun, pipeline: Pipeline, chosen: list[tuple[str, str]]) -> None:
    config = run.config.generate
    bar = progress(total=len(chosen), description="generate", unit="picture")
    for start in run.my_share(range(0, len(chosen), config.shard_size)):
        part = chosen[start : start + config.shard_size]
        path = run.directory / "samples" / f"{start // config.shard_size:06d}.tar"
        if path.exists():
            bar.update(len(part))
        else:
            stop.check()
            prompts = [caption for _, caption in part]
            pictures = pipeline.generate(
                *(prompts, 1, run.config.seed, config.sampling),
                batch_size=config.batch_size,
                first_prompt=start,
                on_pictures=bar.update,
            )
            write_shard(path, [_sample(*pair, picture) for pair, picture in zip(part, pictures, strict=True)])
        run.add_output(path)
        run.add_output(path.with_suffix(".index.npy"))
    bar.close()


def _sample(key: str, caption: str, picture: Image.Image) -> Sample:
    content = io.BytesIO()
    picture.save(content, format="png")
    return Sample(key, content.getvalue(), caption, {"key": key, "caption": caption, "generated": True})


def _save(run: StageRun, picture: Image.Image, name: str) -> None:
    path = Path(run.directory / name)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="png")
    run.add_output(name)


if __name__ == "__main__":
    run_stage("generate", main)
