"""What the engine is asked for, and what it tells of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.sampling.row_batch import Row, slots_of
from pipeline.serving.refusal import Refusal


@dataclass(frozen=True)
class Made:
    """A generated image."""

    png: bytes
    candidate: int
    codes: list[int]  # of all levels, each level's own ids
    score: float | None


@dataclass(frozen=True)
class Partial:
    """An image while it is generated; what is not there yet is transparent."""

    png: bytes
    candidate: int
    index: int  # of the partial image, from 0


@dataclass(frozen=True)
class Finished:
    """All images, in the order of candidates, or best first."""

    images: list[Made]


@dataclass(frozen=True)
class Failed:
    """There will be no images."""

    refusal: Refusal


Event = Partial | Finished | Failed


@dataclass(eq=False)
class Order:
    """`n` images of a prompt, and who is told of them."""

    prompt: str
    text: Tensor  # int64 [T], its ids
    n: int
    seed: int
    sampling: SamplingConfig
    emit: Callable[[Event], object]  # from other threads; the last one is Finished or Failed
    deadline: float  # time.monotonic()
    known: Tensor | None = None  # int64 [N], the codes of an image prompt
    partial_images: int = 0
    ranked: bool = False
    image_prompt: dict[str, str] = field(default_factory=dict)  # for the metadata
    rows: Sequence[Row] = ()
    cancelled: bool = False
    partials: int = 0  # told so far
    started: float = 0.0  # time.monotonic()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True

    @property
    def slots(self) -> int:
        """Rows of the cache that it takes."""
        return self.n * slots_of(self.sampling)
