"""Any number of prompts into a folder, a few at a time: what is there stays, so a stopped job goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.core.progress import progress
from pipeline.core.version import VERSION
from pipeline.sampling.checks import check_prompts
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.image_prompt import ImagePrompt
from pipeline.sampling.pipeline import GeneratedImage, Pipeline
from pipeline.sampling.preview import Preview
from pipeline.sampling.save import open_image, read_about, save_image

_ON_A_SHEET = 1024  # images; more make a sheet that viewers refuse


@dataclass(frozen=True)
class Job:
    """What `smalti generate` was asked for."""

    prompts: list[str]
    candidates: int = 1
    keep: int | None = None
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_prompt: ImagePrompt | None = None
    image_prompt_about: dict[str, str] = field(default_factory=dict)
    batch_size: int = 64
    compiled: bool = False
    preview: bool = False

    @property
    def kept(self) -> int:
        """Images a prompt."""
        return self.keep or self.candidates

    def about(self, prompt: int, pipeline: Pipeline) -> dict[str, Any]:
        """What all images of a prompt have in common, for their metadata."""
        common = {"prompt": self.prompts[prompt], "prompt_number": prompt, "seed": self.seed}
        common |= {"candidates": self.candidates, "sampling": self.sampling.model_dump(mode="json")}
        common |= {"keep": self.keep} if self.keep else {}
        common |= {"image_prompt": self.image_prompt_about} if self.image_prompt_about else {}
        return common | {"model": pipeline.source.model_hash, "smalti": VERSION}


def generate_sheet(pipeline: Pipeline, job: Job, path: Path) -> int:
    """All images on one sheet. Returns how many."""
    if len(job.prompts) * job.kept > _ON_A_SHEET:
        raise UserError(f"a sheet holds {_ON_A_SHEET} images, found more: give a folder, -o images")
    generated = [one for part in _parts(pipeline, job, list(range(len(job.prompts)))) for one in part]
    about = job.about(0, pipeline) | {"prompts": job.prompts}
    _save_sheet([(one.image, job.prompts[one.prompt]) for one in generated], path, about)
    return len(generated)


def generate_folder(pipeline: Pipeline, job: Job, folder: Path) -> int:
    """Each image as <prompt>-<rank>.png, and the first ones as grid.png. Returns how many images there are.

    Raises:
        UserError: the folder holds images of other prompts or settings.
    """
    check_prompts(job.prompts)
    missing = [index for index in range(len(job.prompts)) if not _is_there(pipeline, job, folder, index)]
    for part in _parts(pipeline, job, missing):
        ranks: dict[int, int] = {}
        for one in part:
            rank = ranks[one.prompt] = ranks.get(one.prompt, -1) + 1
            about = job.about(one.prompt, pipeline) | {"candidate": one.candidate}
            about |= {} if one.score is None else {"score": round(one.score, 4)}
            save_image(one.image, _path(folder, one.prompt, rank), about)
    numbers = [(index, rank) for index in range(len(job.prompts)) for rank in range(job.kept)]
    shown = [(open_image(_path(folder, i, r), "grid"), job.prompts[i]) for i, r in numbers[:_ON_A_SHEET]]
    _save_sheet(shown, folder / "grid.png", {"prompts": job.prompts[:_ON_A_SHEET], "seed": job.seed})
    return len(numbers)


def _parts(pipeline: Pipeline, job: Job, prompts: list[int]) -> Iterator[list[GeneratedImage]]:
    """The images of a few prompts at a time; runs of neighbours share their batches."""
    a_time = max(job.batch_size // job.candidates, 1)
    codes = pipeline.transformer.layout.image_length
    preview = Preview(pipeline) if job.preview else None
    with progress(total=len(prompts) * job.candidates * codes, description="generate", unit="token") as bar:
        for run in _runs(prompts, a_time):
            yield pipeline.generate(
                [job.prompts[index] for index in run],
                *(job.candidates, job.seed, job.sampling),
                keep=job.keep,
                image_prompt=job.image_prompt,
                batch_size=job.batch_size,
                first_prompt=run[0],
                compiled=job.compiled,
                on_tokens=bar.update,
                on_row=preview,
            )


def _runs(numbers: list[int], longest: int) -> Iterator[list[int]]:
    """Cut rising numbers into runs without gaps, of at most `longest`."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == longest):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _is_there(pipeline: Pipeline, job: Job, folder: Path, prompt: int) -> bool:
    """Are all images of the prompt generated?"""
    expected = job.about(prompt, pipeline)
    for rank in range(job.kept):
        path = _path(folder, prompt, rank)
        if not path.exists():
            return False
        found = read_about(path) or {}
        different = [name for name, value in expected.items() if found.get(name) != value]
        if different:
            raise UserError(
                f"{path} was generated with another {different[0]} ({found.get(different[0])!r} instead of"
                f" {expected[different[0]]!r}): give another folder, or remove it"
            )
    return True


def _path(folder: Path, prompt: int, rank: int) -> Path:
    return folder / f"{prompt:06d}-{rank:02d}.png"


def _save_sheet(shown: list[tuple[Image.Image, str]], path: Path, about: dict[str, Any]) -> None:
    save_image(grid([Group("", [Tile(image, caption) for image, caption in shown])]), path, about)
