"""Any number of prompts into a folder or onto a sheet, a few at a time; a folder resumes where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipeline.config.base import identity
from pipeline.config.generate import SamplingConfig
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize, height_width
from pipeline.core.progress import progress
from pipeline.core.version import VERSION
from pipeline.sampling.checks import check_prompts
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.image_prompt import ImagePrompt
from pipeline.sampling.model_source import ModelSource
from pipeline.sampling.pipeline import Callbacks, GeneratedImage, Pipeline
from pipeline.sampling.preview import Preview
from pipeline.sampling.save import SHEET, Metadata, check_format, open_image, read_metadata, save_image

_SHEET_LIMIT = 1024  # images; more make a sheet that viewers refuse


@dataclass(frozen=True)
class GenerateJob:
    """What `smalti generate` was asked for; see `Pipeline.generate` for what its fields mean."""

    prompts: list[str]
    candidates: int = 1
    keep: int | None = None
    seed: int = 0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    image_prompt: ImagePrompt | None = None
    image_prompt_options: dict[str, str] = field(default_factory=dict)  # as given, for the metadata
    batch_size: int = 64
    compiled: bool = False
    preview: bool = False

    @property
    def images_per_prompt(self) -> int:
        """Images that are left of a prompt's candidates."""
        return self.keep or self.candidates

    def metadata(self, prompt: int, pipeline: Pipeline) -> dict[str, object]:
        """What the metadata of all images of a prompt have in common."""
        common: dict[str, object] = {"prompt": self.prompts[prompt], "prompt_number": prompt, "seed": self.seed}
        common |= {"candidates": self.candidates, "sampling": identity(pipeline.told(self.sampling))}
        if self.keep:
            common["keep"] = self.keep
            if pipeline.ranker:
                common["reranker"] = pipeline.ranker.model_hash
        if self.image_prompt_options:
            common["image_prompt"] = self.image_prompt_options
        if self.image_prompt:
            common["image_prompt_sha256"] = self.image_prompt.sha256
        return common | {"model": pipeline.source.model_hash, "smalti": VERSION}


def check_sheet(job: GenerateJob, path: Path, source: ModelSource) -> None:
    """Refuse a sheet that could not be written, before the models of `source` are loaded.

    Raises:
        UserError: too many images for a sheet, or for one of the format that the name says.
    """
    _check_sheet(job, path, read_json(source.image_tokenizer / "config.json")["image_size"])


def _check_sheet(job: GenerateJob, path: Path, image_size: ImageSize) -> None:
    if len(job.prompts) * job.images_per_prompt > _SHEET_LIMIT:
        raise UserError(f"a sheet holds {_SHEET_LIMIT} images, found more: give a folder, -o images")
    blank = Image.new("RGB", height_width(image_size)[::-1])
    check_format(path, _sheet([(blank, prompt) for prompt in job.prompts for _ in range(job.images_per_prompt)]).size)


def generate_sheet(pipeline: Pipeline, job: GenerateJob, path: Path) -> int:
    """Generate all images onto one sheet, the image file `path`; returns how many there are.

    Raises:
        UserError: as `check_sheet`; before any is generated.
    """
    _check_sheet(job, path, pipeline.image_tokenizer.image_size)
    generated = [one for part in _generate(pipeline, job, range(len(job.prompts))) for one in part]
    metadata = job.metadata(0, pipeline) | {"prompts": job.prompts}
    _save_sheet([(one.image, job.prompts[one.prompt]) for one in generated], path, metadata)
    return len(generated)


def generate_folder(pipeline: Pipeline, job: GenerateJob, folder: Path) -> int:
    """Generate each image as <prompt>-<rank>.png, and the first ones as grid.png; returns how many there are.

    Prompts whose images are all there are left as they are.

    Raises:
        UserError: the folder holds images of other prompts or settings.
    """
    check_prompts(job.prompts)
    missing = [prompt for prompt in range(len(job.prompts)) if not _is_complete(pipeline, job, folder, prompt)]
    for part in _generate(pipeline, job, missing):
        ranks: dict[int, int] = {}
        for one in part:
            rank = ranks[one.prompt] = ranks.get(one.prompt, -1) + 1
            metadata = job.metadata(one.prompt, pipeline) | {"candidate": one.candidate}
            if one.score is not None:
                metadata["score"] = round(one.score, 4)
            save_image(one.image, _path(folder, one.prompt, rank), metadata)
    files = [(prompt, rank) for prompt in range(len(job.prompts)) for rank in range(job.images_per_prompt)]
    shown = [(open_image(_path(folder, i, rank), "grid"), job.prompts[i]) for i, rank in files[:_SHEET_LIMIT]]
    _save_sheet(shown, folder / SHEET, {"prompts": job.prompts[:_SHEET_LIMIT], "seed": job.seed})
    return len(files)


def _generate(pipeline: Pipeline, job: GenerateJob, prompts: Sequence[int]) -> Iterator[list[GeneratedImage]]:
    """The images of a few prompts at a time; consecutive prompts share their batches."""
    prompts_per_call = max(job.batch_size // job.candidates, 1)
    codes = pipeline.transformer.layout.image_length
    with progress(total=len(prompts) * job.candidates * codes, description="generate", unit="token") as bar:
        callbacks = Callbacks(on_tokens=bar.update, on_row=Preview(pipeline) if job.preview else None)
        for numbers in _consecutive(prompts, prompts_per_call):
            yield pipeline.generate(
                [job.prompts[index] for index in numbers],
                job.candidates,
                job.seed,
                job.sampling,
                keep=job.keep,
                image_prompt=job.image_prompt,
                first_prompt=numbers[0],
                batch_size=job.batch_size,
                compiled=job.compiled,
                callbacks=callbacks,
            )


def _consecutive(numbers: Sequence[int], longest: int) -> Iterator[list[int]]:
    """Cut rising numbers into stretches without gaps, of at most `longest`."""
    stretch: list[int] = []
    for number in numbers:
        if stretch and (number != stretch[-1] + 1 or len(stretch) == longest):
            yield stretch
            stretch = []
        stretch.append(number)
    if stretch:
        yield stretch


def _is_complete(pipeline: Pipeline, job: GenerateJob, folder: Path, prompt: int) -> bool:
    """Are all images of the prompt there? Raises UserError for one that was generated with other settings."""
    expected, complete = job.metadata(prompt, pipeline), True
    for rank in range(job.images_per_prompt):
        path = _path(folder, prompt, rank)
        if not path.exists():
            complete = False  # the others are looked at still: they are drawn anew with it
            continue
        found = read_metadata(path) or {}
        different = [name for name, value in expected.items() if found.get(name) != value]
        if different:
            raise UserError(
                f"{path} was generated with another {different[0]} ({found.get(different[0])!r} instead of"
                f" {expected[different[0]]!r}): give another folder, or remove it"
            )
    return complete


def _path(folder: Path, prompt: int, rank: int) -> Path:
    return folder / f"{prompt:06d}-{rank:02d}.png"


def _save_sheet(shown: list[tuple[Image.Image, str]], path: Path, metadata: Metadata) -> None:
    save_image(_sheet(shown), path, metadata)


def _sheet(shown: list[tuple[Image.Image, str]]) -> Image.Image:
    return grid([Group("", [Tile(image, caption) for image, caption in shown])])
