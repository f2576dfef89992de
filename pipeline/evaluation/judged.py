"""Runs on the source shapes: what the judge finds in images of prompts, seen and held out, and in reconstructions.

The prompts are of the six tasks of GenEval (`pipeline/shapes/prompts.py`); images stay in judged/<combinations>.tar,
so a stopped stage resumes. A row is the share of images that show exactly what their prompt says.
"""

from __future__ import annotations

from itertools import cycle, islice
from pathlib import Path
from random import Random

from scipy.stats import binomtest

from pipeline.core import distributed, signals
from pipeline.core.image_io import png_bytes
from pipeline.data.shards import Sample, write_shard
from pipeline.evaluation.image_sets import StoredImage, images_at
from pipeline.evaluation.reconstruction import reconstruct
from pipeline.evaluation.rows import Row
from pipeline.image_tokenizer.base import ImageTokenizer
from pipeline.orchestration.stage_run import StageRun
from pipeline.sampling.pipeline import Pipeline
from pipeline.shapes.judge import Verdict, judge
from pipeline.shapes.prompts import TASKS, prompts

METRIC = "right"
COMBINATIONS = {
    "seen": "generated, prompts of seen combinations",
    "held-out": "generated, prompts of held-out combinations",
}
RECONSTRUCTED = "validation images, their reconstructions"


def judged_prompts(count: int, held_out: bool, seed: int) -> list[str]:
    """`count` prompts of each task that has such combinations, all of them in turn; said as `seed` has it."""
    random = Random(f"judged, {seed}, {held_out}")
    texts = []
    for task in TASKS:
        combinations = [prompt for prompt in prompts(task) if prompt.held_out == held_out]
        random.shuffle(combinations)
        texts += [prompt.say(random) for prompt in islice(cycle(combinations), count if combinations else 0)]
    return texts


def generate_judged(run: StageRun) -> dict[str, Path]:
    """The images of prompts of seen and of held-out combinations, as tars; those that are there stay."""
    count, sampling = run.config.evaluate.judged_prompts, run.config.generate.sampling
    tars = {name: run.directory / "judged" / f"{name}.tar" for name in COMBINATIONS}
    missing = [name for name, path in tars.items() if not path.is_file()]
    pipeline = Pipeline.from_pretrained(run.input("transformer").parent, distributed.device()) if missing else None
    for name in missing:
        signals.check()
        assert pipeline is not None
        texts = judged_prompts(count, name == "held-out", run.seed)
        found = pipeline.generate(texts, 1, run.seed, sampling, batch_size=run.config.generate.batch_size)
        images = zip(texts, found, strict=True)
        write_shard(
            tars[name],
            [Sample(f"{number:06d}", png_bytes(one.image), text, {}) for number, (text, one) in enumerate(images)],
        )
    return tars


def judged_rows(run: StageRun, tokenizer: ImageTokenizer, validation: list[StoredImage]) -> list[Row]:
    """The share of right images by task, generated of both kinds of prompts; and of reconstructions, which blur."""
    rows = []
    for name, path in generate_judged(run).items():
        images = images_at(path)
        rows += _rows([judge(one.image, one.caption or "") for one in images], COMBINATIONS[name])
        run.add_output(path)
    known = [one for one in validation if one.caption]
    rebuilt = reconstruct(tokenizer, [one.image for one in known], run.config.evaluate.batch_size)
    verdicts = [judge(image, one.caption or "") for image, one in zip(rebuilt, known, strict=True)]
    return rows + _rows(verdicts, RECONSTRUCTED)[-1:]


def _rows(verdicts: list[Verdict], compares: str) -> list[Row]:
    """A row per task, and last one for all."""
    groups = {task: [verdict.right for verdict in verdicts if verdict.task == task] for task in TASKS}
    groups["all tasks"] = [verdict.right for verdict in verdicts]
    return [_row(f"{METRIC}, {name}", compares, right) for name, right in groups.items() if right]


def _row(metric: str, compares: str, right: list[bool]) -> Row:
    n = len(right)
    found = binomtest(sum(right), n).proportion_ci(method="wilson")
    return Row(
        metric=metric,
        compares=compares,
        value=sum(right) / n,
        better="higher",
        n_real=n,
        n_generated=n,
        interval=(float(found.low), float(found.high)),
        interval_of="95 % confidence, Wilson",
        protocol="shapes",
    )
