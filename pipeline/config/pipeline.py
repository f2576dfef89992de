"""`PipelineConfig`: a whole pipeline as one config, a section for each stage."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from pipeline.config.base import Config, added, load_config, operational
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.generate import GenerateConfig
from pipeline.config.image_tokenizer import ImageTokenizerConfig
from pipeline.config.image_tokenizer_model import ModelConfig
from pipeline.config.prepare import PrepareConfig
from pipeline.config.renamed import with_current_names
from pipeline.config.report import ReportConfig
from pipeline.config.reranker import RerankerConfig
from pipeline.config.store import StoreConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import TrainingConfig
from pipeline.config.transformer import TransformerConfig, forget_derived
from pipeline.config.tune import TuneConfig
from pipeline.core.image_size import ImageSize, height_width, image_size

log = logging.getLogger(__name__)

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _plain(size: ImageSize) -> str:
    """A size as it stands in a config."""
    return str(size) if isinstance(size, int) else str(list(size))


def _check_scales(model: ModelConfig, size: int) -> None:
    """A square image's grid of codes is the last of a multiscale quantizer's."""
    [*others, quantizer] = model.quantizers
    if others or quantizer.kind != "multiscale":
        return
    side = size // model.factor
    if quantizer.scales[-1] != side:
        raise ValueError(
            f"image_tokenizer.model.quantizer.scales: expected the last one to be {side}, the codes on a side of images"
            f" of {size} pixels, found {quantizer.scales[-1]}: change it, prepare.image_size, widths or patch_size"
        )


@runtime_checkable
class Trained(Protocol):
    """A section whose stage trains a model."""

    training: TrainingConfig


@runtime_checkable
class Switchable(Protocol):
    """A section whose stage can be left out of the pipeline."""

    enabled: bool


class PipelineConfig(Config):
    """A whole pipeline: one section per stage. See `configs/` for complete examples."""

    name: str = operational(..., pattern=_NAME, description="name of the run directory and of the MLflow run")
    runs: Path = operational(Path("runs"), description="folder of run directories; this one is runs/name")
    seed: int = Field(0, ge=0, description="of the split, the order of samples, initial weights and sampling")
    processes: int | None = operational(
        None,
        ge=1,
        description="processes per stage that trains or splits, on this machine (prepare has its `workers`); None: one"
        " per GPU, or one",
    )
    tracking: TrackingConfig = operational(TrackingConfig())
    store: StoreConfig = operational(StoreConfig.model_validate({}))

    prepare: PrepareConfig
    text_tokenizer: TextTokenizerConfig
    image_tokenizer: ImageTokenizerConfig
    tokenize: TokenizeConfig
    transformer: TransformerConfig
    reranker: RerankerConfig = RerankerConfig()
    tune: TuneConfig = added(TuneConfig())
    generate: GenerateConfig
    evaluate: EvaluateConfig
    report: ReportConfig

    _directory: Path | None = PrivateAttr(None)
    _branched_from: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check(self) -> PipelineConfig:
        if self.generate.candidates > 1 and not self.reranker.enabled:
            raise ValueError(
                f"generate.candidates={self.generate.candidates} needs a reranker to choose: set reranker.enabled=true"
            )
        self._check_order()
        if self.transformer.condition == "class" and self.generate.new_prompts:
            raise ValueError(
                "generate.new_prompts: transformer.condition=class has no prompts but its classes: leave it out"
            )
        kinds = {quantizer.kind for quantizer in self.image_tokenizer.model.quantizers}
        if self.evaluate.perturbations and "multiscale" in kinds:
            raise ValueError("evaluate.perturbations: pFID is not defined for quantizer multiscale: leave it out")
        self._check_image_size()
        if self.tune.enabled:
            self._check_tune()
        return self

    def _check_order(self) -> None:
        order = self.transformer.order
        if wrong := self.generate.sampling.not_followed_by(order):
            raise ValueError(f"generate.sampling.{wrong}")
        if order == "scale" and self.image_tokenizer.levels == 1:
            raise ValueError(
                "transformer.order=scale needs an image tokenizer of several levels, found one: set"
                " image_tokenizer.model.quantizer.kind=multiscale, say, or order to any"
            )

    def _check_tune(self) -> None:
        if self.transformer.order == "any":
            raise ValueError(
                "tune needs transformer.order raster or scale, whose probabilities of an image are exact, found any:"
                " leave tune out"
            )
        if self.tune.reward == "reranker" and not self.reranker.enabled:
            raise ValueError("tune.reward=reranker: expected a reranker, found none: set reranker.enabled=true")
        kinds = {source.kind for source in self.prepare.all_sources}
        if self.tune.reward == "judge" and kinds != {"shapes"}:
            raise ValueError(
                f"tune.reward=judge reads images of the source shapes alone, found {', '.join(sorted(kinds))}: set"
                " reward to reranker or clip"
            )

    def _check_image_size(self) -> None:
        size, tokenizer = self.prepare.image_size, self.image_tokenizer
        sides = height_width(size)
        factors = {}
        if tokenizer.pretrained is None:  # whose factor its own files have
            factors["the image tokenizer (patch_size × 2 ** (len(widths) - 1))"] = tokenizer.model.factor
        if self.reranker.enabled and self.reranker.clip is None:
            factors["reranker.model.patch_size"] = self.reranker.model.patch_size
        for what, factor in factors.items():
            if any(side % factor for side in sides):
                near = image_size([max(round(side / factor), 1) * factor for side in sides])
                wanted = "a multiple" if isinstance(size, int) else "multiples"
                raise ValueError(
                    f"prepare.image_size: expected {wanted} of {factor}, as {what} wants, found {_plain(size)}:"
                    f" set image_size={_plain(near)}, or change that"
                )
        if tokenizer.adversarial is not None and min(sides) < (least := 3 * 2**tokenizer.adversarial.layers):
            raise ValueError(
                f"image_tokenizer.adversarial.layers={tokenizer.adversarial.layers} needs images of at least"
                f" {least}×{least} pixels, found prepare.image_size={_plain(size)}: set layers to less, or leave it out"
            )
        if isinstance(size, int):
            _check_scales(tokenizer.model, size)
            return
        if any(quantizer.kind == "multiscale" for quantizer in tokenizer.model.quantizers):
            raise ValueError(
                f"image_tokenizer.model: the grids of quantizer multiscale are square, found prepare.image_size="
                f"{_plain(size)}: set one number, or another quantizer"
            )
        if any(source.kind == "shapes" for source in self.prepare.all_sources):
            raise ValueError(
                f"prepare.image_size: scenes of source shapes are square, found {_plain(size)}: set one number"
            )

    @property
    def run_directory(self) -> Path:
        """Of a run's own config, where that lies: a run may be moved, renamed and copied."""
        return self._directory or self.runs / self.name

    @property
    def branched_from(self) -> Path | None:
        """The run directory whose config this is, under another name."""
        return self._branched_from

    def section(self, name: str) -> Config:
        """The section of a stage; `name` as in the config file or as on the command line (`text-tokenizer`)."""
        section: Config = getattr(self, name.replace("-", "_"))
        return section

    def training(self, name: str) -> TrainingConfig | None:
        """How the stage of this section trains; None if it does not."""
        section: object = self.section(name)
        return section.training if isinstance(section, Trained) else None

    def is_enabled(self, name: str) -> bool:
        """Whether the stage of this section is part of the pipeline."""
        section: object = self.section(name)
        return section.enabled if isinstance(section, Switchable) else True


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read a pipeline config, or the one of a run directory, which means that run, wherever it lies now.

    With `name=…` or `runs=…` the config of a run means a new run, which branches off (`branched_from`). Keys of a run
    that this version does not know are left out, with a warning; those of a user's file and of overrides are errors.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    path = Path(path) / "config.yaml" if os.path.isdir(path) else Path(path)
    if not is_run_config(path):
        return load_config(PipelineConfig, path, overrides)
    own: dict[str, object] = {}

    def clean(values: dict[str, object]) -> dict[str, object]:
        own.update(_of_this_run(values, path))
        section, prefix = own.get("transformer"), "transformer."
        if not isinstance(section, dict):
            return dict(own)
        keys = [override.partition("=")[0] for override in overrides]
        changed = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        return own | {"transformer": forget_derived(section, changed)}

    config = load_config(PipelineConfig, path, overrides, clean)
    if (str(config.runs), config.name) == (own["runs"], own["name"]) or (
        config.run_directory.resolve() == path.parent.resolve()
    ):
        config._directory = path.parent
    else:
        config._branched_from = path.parent
    return config


def is_run_config(path: str | Path) -> bool:
    """Whether a file is the config of a run directory: run.json beside it, or what a run without it has."""
    path = Path(path)
    beside = (path.parent / name for name in ("run.json", "code/version.json"))
    return path.name == "config.yaml" and any(os.path.isfile(record) for record in beside)


def _of_this_run(values: dict[str, object], path: Path) -> dict[str, object]:
    """The values of a run's config with where the run lies now, and without keys that this version does not know."""
    directory = path.parent.resolve()
    # A folder may be renamed to what no name of a run can be.
    names = [name for name in (directory.name, str(values.get("name"))) if re.match(_NAME, name)]
    parent = path.parent.parent if path.parent.name not in ("", "..") else directory.parent
    values = with_current_names(values) | {"name": [*names, "run"][0], "runs": str(parent)}
    try:
        PipelineConfig.model_validate(values)
        return values
    except ValidationError as error:
        unknown: list[Any] = [found["loc"] for found in error.errors() if found["type"] == "extra_forbidden"]
    for location in unknown:
        node: Any = values
        for part in location[:-1]:  # of a union, the tag, too, which is no key
            if (isinstance(node, dict) and part in node) or isinstance(node, list):
                node = node[part]
        node.pop(location[-1], None)
    if unknown:
        keys = ", ".join(".".join(map(str, location)) for location in unknown)
        log.warning("%s: made by another version, with keys that this one does not know: %s; left out", path, keys)
    return values
