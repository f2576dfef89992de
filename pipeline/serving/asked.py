"""What a client may ask for: the fields of OpenAI's images API, and our settings beside them, with their bounds."""

from __future__ import annotations

import secrets
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.core.text import clean_text
from pipeline.sampling.checks import check_prompts, check_sampling
from pipeline.sampling.pipeline import Pipeline
from pipeline.sampling.row_batch import slots_of
from pipeline.serving.refusal import Refusal

LARGEST_PROMPT = 4_000  # characters
MOST_IMAGES = 10  # OpenAI's bound
MOST_PARTIAL_IMAGES = 64
_SETTINGS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("guidance", "guidance_schedule", "guidance_power", "guidance_interval"),
    *("passes", "schedule", "pass_order", "temperature_end"),
)


def _finite(value: object) -> object:
    if isinstance(value, bool):  # which Python takes for a number
        raise ValueError("expected a number, found true or false")
    return value


_Number = Annotated[float, BeforeValidator(_finite), Field(allow_inf_nan=False)]
_Whole = Annotated[int, BeforeValidator(_finite)]


class Asked(BaseModel):
    """A request for images. Unknown fields are refused; those of the last group are taken and have no effect."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"prompt": "red heart", "n": 2}})

    prompt: str = Field(min_length=1, max_length=LARGEST_PROMPT)
    model: str | None = Field(None, max_length=200, description="an id of /v1/models; none: the one there is")
    n: _Whole = Field(1, ge=1, le=MOST_IMAGES)
    size: str | None = Field(None, max_length=20, description="the model's own size, or auto")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    stream: bool = False
    partial_images: _Whole = Field(0, ge=0, le=MOST_PARTIAL_IMAGES, description="with stream: how many before the last")

    seed: _Whole | None = Field(None, ge=0, le=2**63 - 1, description="none: a new one, which the answer tells")
    temperature: _Number | None = Field(None, ge=0, le=10)
    top_k: _Whole | None = Field(None, ge=1, le=2**31 - 1)
    top_p: _Number | None = Field(None, gt=0, le=1)
    min_p: _Number | None = Field(None, ge=0, le=1)
    guidance: _Number | None = Field(None, ge=0, le=100)
    guidance_schedule: Literal["constant", "linear", "cosine", "power"] | None = None
    guidance_power: _Number | None = Field(None, gt=0, le=10, description="of guidance_schedule power: its exponent")
    guidance_interval: tuple[_Number, _Number] | None = None
    passes: _Whole | None = Field(None, ge=1, le=2**20, description="of models of order any: one a level to one a code")
    schedule: Literal["cosine", "linear"] | None = Field(None, description="of models of order any")
    pass_order: Literal["random", "halton", "confidence"] | None = Field(None, description="of models of order any")
    temperature_end: _Number | None = Field(None, ge=0, le=10, description="of models of order any and scale")
    rank: bool = Field(False, description="best first, as the reranker sees them")
    codes: bool = Field(False, description="answer the codes of each image, too")

    background: Literal["auto", "opaque"] | None = None
    quality: str | None = Field(None, max_length=20)
    style: str | None = Field(None, max_length=20)
    moderation: str | None = Field(None, max_length=20)
    output_compression: _Whole | None = None
    user: str | None = Field(None, max_length=1_000)
    safety_identifier: str | None = Field(None, max_length=1_000)

    def _sampling(self, pipeline: Pipeline) -> SamplingConfig:
        """The model's own settings, and over them those that were asked for. Raises Refusal."""
        given = {name: getattr(self, name) for name in _SETTINGS if getattr(self, name) is not None}
        try:
            sampling = SamplingConfig.model_validate(pipeline.source.sampling.model_dump() | given)
            check_sampling(
                sampling, pipeline.transformer.layout, pipeline.transformer.shape, pipeline.source.guidance_trained
            )
        except ValidationError as error:
            raise invalid(error) from error
        except UserError as error:
            raise Refusal(400, str(error), "invalid_value") from error
        return sampling

    def checked_prompt(self) -> str:
        """The prompt as captions are. Raises Refusal."""
        try:
            check_prompts([self.prompt])
        except UserError as error:
            message = "expected text that shows something in Unicode: write what the image should show"
            raise Refusal(400, f"prompt: {message}", "invalid_value", "prompt") from error
        return clean_text(self.prompt)

    def chosen_seed(self) -> int:
        return secrets.randbits(32) if self.seed is None else self.seed

    def sampling_for(self, pipeline: Pipeline, name: str, slots: int) -> SamplingConfig:
        """How its images are drawn. Raises Refusal for what this model does not have: its name, its size, a reranker,
        a setting; and for more images than `slots`."""
        size = f"{pipeline.image_tokenizer.width}x{pipeline.image_tokenizer.height}"
        if self.model is not None and self.model != name:
            raise Refusal(404, f"model: expected {name}, the one that is served here", "model_not_found", "model")
        if self.size not in (None, "auto", size):
            raise Refusal(400, f"size: expected {size} or auto: the model has one size", "invalid_value", "size")
        if self.rank and pipeline.ranker is None:
            raise Refusal(400, "rank: this model has no reranker: leave it out", "invalid_value", "rank")
        try:
            pipeline.text_tokenizer.check([self.prompt])
        except UserError as error:
            raise Refusal(400, f"prompt: {error}", "invalid_value", "prompt") from error
        sampling = self._sampling(pipeline)
        needed = self.n * slots_of(sampling)
        if needed > slots:
            raise Refusal(
                400, f"n: expected at most {slots * self.n // needed} here with these settings", "too_many", "n"
            )
        return sampling


class AskedOfImage(Asked):
    """A request that starts from an image: with a mask, or with one of our two rules."""

    keep_rows: _Whole | None = Field(None, ge=1, le=10_000, description="rows of codes that stay, from the top")
    keep_levels: _Whole | None = Field(None, ge=1, le=100, description="coarse levels of codes that stay")
    input_fidelity: str | None = Field(None, max_length=20)


def invalid(error: ValidationError) -> Refusal:
    """What is wrong first, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")[:100]
    return Refusal(400, f"{where or 'body'}: {first['msg']}", "invalid_value", where or None)
