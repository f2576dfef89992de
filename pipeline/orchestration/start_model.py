"""`init_from`: the model whose weights a training starts with, in a run, an export or a folder. Imports no torch.

What `image_tokenizer.pretrained` takes counts by its content, too.

start = find_start("runs/openmoji", "transformer")     # RUN/transformer/model, EXPORT/transformer or the folder itself
start.content                                          # a hash of its weights: part of the stage's identity
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from pipeline.config.base import Config, digest
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.yaml_text import read_yaml
from pipeline.core.atomic_io import read_json, sha256_file
from pipeline.core.errors import UserError
from pipeline.core.tokenizer_files import tokenizer_files
from pipeline.orchestration.going_on import recorded_identity
from pipeline.orchestration.graph import Stage, stage_identity

Keys = tuple[str, ...]
_INIT_FROM, _PRETRAINED = ("init_from",), ("pretrained", "path")  # in the section of a stage


@dataclass(frozen=True)
class StartModel:
    """Another model, from which a training starts."""

    folder: Path  # config.json and its weights
    text_tokenizer: Path | None  # folder of the one that its text ids are of, where it lies near

    @property
    def content(self) -> str:
        """A hash of its weights, and of the tokenizer that says what its rows of text stand for."""
        text = [self.text_tokenizer / "tokenizer.json"] if self.text_tokenizer else []
        return digest([_sha256(path) for path in [*_weights(self.folder), *text]])[:16]


def init_from(section: Config) -> Path | None:
    """What the section of a stage says to start from."""
    found = getattr(section, "init_from", None)
    return None if found is None else Path(found)


def made_from(config: PipelineConfig, stage: Stage, directory: Path) -> dict[str, object]:
    """`stage_identity`, with the content of the weights that the stage starts with in place of their path.

    What the stage in `directory` has begun with may be gone.

    Raises:
        UserError: there are no such weights, or they are the stage's own.
    """
    own, given = stage_identity(config, stage.name), _given(config.section(stage.section))
    if given is None:
        return own
    keys, path = given
    try:
        # Of the run that this one branches off, the weights are those of another model.
        own_folder = None if directory.parent == config.branched_from else directory
        content = _of_other_library(Path(path)) if keys == _PRETRAINED else _of_start(Path(path), stage, own_folder)
    except UserError:
        known = _recorded(directory, stage.section, keys, path)
        if known is None:
            raise
        content = known
    *sections, last = stage.section, *keys
    values = changed = deepcopy(own)
    for name in sections:
        values = cast(dict[str, object], values[name])
    values[last] = content
    return changed


def _given(section: Config) -> tuple[Keys, str] | None:
    """Which key of the section names weights to begin with, and the path that it gives."""
    for keys in (_INIT_FROM, _PRETRAINED):
        found: object = section
        for key in keys:
            found = getattr(found, key, None)
        if found is not None:
            return keys, str(found)
    return None


def _of_start(source: Path, stage: Stage, own: Path | None) -> str:
    start = find_start(source, stage.name)
    if own and start.folder.resolve().is_relative_to(own.resolve()):
        raise UserError(
            f"{stage.section}.init_from: expected another model, found the run's own, {start.folder}: raise"
            " training.steps to go on with it, or set name=… for a run that starts from it"
        )
    return start.content


def _of_other_library(path: Path) -> str:
    files = tokenizer_files(path)
    if not files or not path.exists():
        raise UserError(f"image_tokenizer.pretrained.path: expected weights at {path}, found none: check the path")
    return digest([_sha256(file) for file in files])[:16]


def _recorded(directory: Path, section: str, keys: Keys, path: str) -> str | None:
    """The content of what the stage in `directory` has begun with; None: it has not, or from another place."""
    identity, config = recorded_identity(directory), directory / "config.yaml"
    if not isinstance(identity, dict) or not config.is_file():
        return None
    began: object = read_yaml(config.read_text(), str(config))
    found: object = identity["config"][section]
    for key in keys:
        began, found = (values.get(key) if isinstance(values, dict) else None for values in (began, found))
    return str(found) if began == path and found is not None else None


def find_start(source: Path, stage: str) -> StartModel:
    """The model of `stage` in a run, an export or a folder.

    Raises:
        UserError: there is none, or the run's is not finished.
    """
    key = f"{stage.replace('-', '_')}.init_from"
    of_run = source / stage / "model"
    if (source / "config.yaml").is_file() and not (source / stage / "_SUCCESS").is_file():
        raise UserError(
            f"{key}: expected a run whose stage {stage} is finished, found {source}, where it is not: finish it, or"
            " give the folder that `smalti export RUN --step N` makes of a checkpoint"
        )
    for folder in (of_run, source / stage, source):
        if (folder / "config.json").is_file() and _weights(folder):
            return StartModel(folder, _text_tokenizer(source, folder) if stage == "transformer" else None)
    raise UserError(
        f"{key}: expected a run, an export or a folder with config.json and model.safetensors, found none of them at"
        f" {source}: give another path"
    )


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _text_tokenizer(source: Path, folder: Path) -> Path | None:
    """Of a run or an export that was given, or whose folder was; of a checkpoint's export inside of its run, too."""
    around = [source, folder, *folder.absolute().parents[:3]]
    found = (place / "text-tokenizer" for place in around)
    return next((place for place in found if (place / "tokenizer.json").is_file()), None)


def _sha256(path: Path) -> str:
    """From the manifest of a finished stage; of another file it is computed, once a process."""
    stage = path.parent.parent if path.parent.name == "model" else path.parent
    if (stage / "_SUCCESS").is_file() and (stage / "manifest.json").is_file():
        recorded = read_json(stage / "manifest.json")["outputs"].get(str(path.relative_to(stage)))
        if recorded:
            return str(recorded["sha256"])
    about = path.stat()
    return _hashed(path, about.st_size, about.st_mtime_ns)


@lru_cache
def _hashed(path: Path, _size: int, _time_ns: int) -> str:
    return sha256_file(path)
