"""Stage 6, generate: generate the prompts that people look at, and captions of the train split for the metrics.

Reads prepare (captions), the three models, and the reranker where there is one, which then scores every image and
keeps the best of `generate.candidates`. Writes prompts/00.png ..., prompts.json and the grid
prompts.png, order.png (the first prompt after each quarter of its passes), then samples/000000.tar ... (KEY.png,
KEY.txt, KEY.json; KEY is that of the caption's own image), shard by shard: after a stop or a crash the finished ones
stay. Array tasks share these shards, and the stage itself, after them, adds the prompts. See pipeline/sampling/.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from pipeline.cli.stage import run_stage
from pipeline.config.base import identity
from pipeline.core import distributed, signals
from pipeline.core.atomic_io import write_json
from pipeline.core.image_io import png_bytes
from pipeline.core.progress import progress
from pipeline.data.catalog import Catalog
from pipeline.data.shards import Sample, write_shard
from pipeline.orchestration.stage_run import StageRun
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.order_strip import order_strip
from pipeline.sampling.pipeline import Callbacks, GeneratedImage, Pipeline, sampling_dtype
from pipeline.sampling.prompts import check_against_training, sampled_rows
from pipeline.sampling.save import Metadata, save_image

_HEADINGS = {  # by kind of prompt: title and note on the grid
    "training": (
        "Training captions",
        "Captions of training images: a small model mostly generates those images again.",
    ),
    "new": ("New prompts", "Prompts that training never saw: new combinations of known words."),
}


def main(run: StageRun) -> None:
    if not distributed.is_main():
        return
    config = run.config.generate
    catalog = Catalog(run.input("prepare"), "train")
    check_against_training(config, catalog)
    rows = sampled_rows(len(catalog), config.samples, run.config.seed)
    chosen = list(zip(catalog.keys(rows), catalog.captions(rows), strict=True))
    device = distributed.device()
    dtype = sampling_dtype(config.sampling.dtype, device)
    pipeline = Pipeline.from_pretrained(run.input("transformer").parent, device, dtype=dtype)
    if run.array_task is None:
        _generate_prompts(run, pipeline)
    _generate_samples(run, pipeline, chosen)


def _generate_prompts(run: StageRun, pipeline: Pipeline) -> None:
    """Write prompts/NN.png, prompts.json and the grid prompts.png."""
    config = run.config.generate
    entries = [(prompt, "training") for prompt in config.training_prompts]
    entries += [(prompt, "new") for prompt in config.new_prompts]
    if not entries:
        return
    generated = _generate(run, pipeline, [prompt for prompt, _ in entries])
    sampling = identity(pipeline.told(config.sampling))
    listed = []
    for number, ((prompt, kind), one) in enumerate(zip(entries, generated, strict=True)):
        file = f"prompts/{number:02d}.png"
        listed.append({"prompt": prompt, "kind": kind, "file": file} | _score(one))
        common = {"prompt": prompt, "seed": run.seed, "sampling": sampling}
        _save(run, one.image, file, common | _origin(pipeline, one))
    write_json(run.directory / "prompts.json", listed)
    run.add_output("prompts.json", artifact=True)
    sheet = _grid(entries, generated)
    _save(run, sheet, "prompts.png", {})
    run.tracker.log_image("prompts", sheet, 0)
    _save(run, order_strip(pipeline, entries[0][0], 0, run.seed, config.sampling), "order.png", {})


def _grid(entries: Sequence[tuple[str, str]], generated: Sequence[GeneratedImage]) -> Image.Image:
    """A sheet with a group for each kind of prompt; `entries` are prompts and their kinds."""
    groups = []
    for kind, (title, note) in _HEADINGS.items():
        pairs = zip(entries, generated, strict=True)
        tiles = [Tile(one.image, prompt) for (prompt, its_kind), one in pairs if its_kind == kind]
        if tiles:
            groups.append(Group(title, tiles, note))
    return grid(groups)


def _generate_samples(run: StageRun, pipeline: Pipeline, chosen: Sequence[tuple[str, str]]) -> None:
    """Write the shards of this task; `chosen` are keys and captions."""
    config = run.config.generate
    tokens_per_sample = pipeline.transformer.layout.image_length * config.candidates
    with progress(total=len(chosen) * tokens_per_sample, description="generate", unit="token") as bar:
        for number, start in enumerate(run.my_share(range(0, len(chosen), config.shard_size)), start=1):
            part = chosen[start : start + config.shard_size]
            path = run.directory / "samples" / f"{start // config.shard_size:06d}.tar"
            if path.exists():
                bar.update(len(part) * tokens_per_sample)
            else:
                signals.check()
                prompts = [caption for _, caption in part]
                generated = _generate(run, pipeline, prompts, start, Callbacks(on_tokens=bar.update))
                pairs = zip(part, generated, strict=True)
                write_shard(path, [_sample(key, caption, pipeline, one) for (key, caption), one in pairs])
            run.add_output(path)
            run.add_output(path.with_suffix(".index.npy"))
            run.pieces_done(number)


def _generate(
    run: StageRun,
    pipeline: Pipeline,
    prompts: Sequence[str],
    first_prompt: int = 0,
    callbacks: Callbacks | None = None,
) -> list[GeneratedImage]:
    """An image per prompt: where there is a reranker, the candidate that it scores highest."""
    config = run.config.generate
    return pipeline.generate(
        prompts,
        config.candidates,
        run.seed,
        config.sampling,
        keep=1 if pipeline.ranker is not None else None,
        first_prompt=first_prompt,
        batch_size=config.batch_size,
        compiled=config.compile,
        callbacks=callbacks,
    )


def _sample(key: str, caption: str, pipeline: Pipeline, one: GeneratedImage) -> Sample:
    metadata = {"key": key, "caption": caption, "generated": True} | _origin(pipeline, one)
    return Sample(key, png_bytes(one.image), caption, metadata)


def _origin(pipeline: Pipeline, one: GeneratedImage) -> dict[str, object]:
    """Metadata of an image beside its prompt: which candidate of which model it is, and its score."""
    return {"prompt_number": one.prompt, "candidate": one.candidate, "model": pipeline.source.model_hash} | _score(one)


def _score(one: GeneratedImage) -> dict[str, float]:
    return {} if one.score is None else {"score": round(one.score, 4)}


def _save(run: StageRun, image: Image.Image, name: str, metadata: Metadata) -> None:
    save_image(image, run.directory / name, metadata)
    run.add_output(name, artifact=True)


if __name__ == "__main__":
    run_stage("generate", main)
