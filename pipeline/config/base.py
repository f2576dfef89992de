"""Typed configuration: YAML file + dotted overrides -> frozen pydantic models.

    config = load_config(PipelineConfig, "configs/openmoji.yaml", ["transformer.layers=8"])

Unknown keys are errors that name the key and its nearest neighbour. There is a module
for each section; `pipeline.py` puts them together. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config.mistakes import LARGEST_INTEGER, explain, nested_models
from pipeline.config.renamed import with_current_names
from pipeline.config.yaml_text import read_value, read_yaml
from pipeline.core.errors import UserError
from pipeline.core.text import decode_text
from pipeline.core.urls import mask

log = logging.getLogger(__name__)


class Config(BaseModel):
    """The base of every config class: frozen, an unknown key is an error, and so is an infinite number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def deciding(self) -> frozenset[str]:
        """Operational fields that decide the result all the same, with these values of others."""
        return frozenset()


ConfigT = TypeVar("ConfigT", bound=Config)


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how a stage runs but never what it makes (logging intervals, workers).

    Such fields are left out of `identity`, so changing one never makes a finished stage run again; but see
    `Config.deciding`.
    """
    return Field(default, json_schema_extra={"operational": True}, **kwargs)


def added(default: Any, **kwargs: Any) -> Any:
    """A field that came after runs were made without it: at its default, it is left out of `identity`.

    So those runs stay up to date. The default must do what was done before.
    """
    return Field(default, json_schema_extra={"added": True}, **kwargs)


def _is_added(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("added"))


def is_operational(field: FieldInfo) -> bool:
    """Whether `operational` made this field."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("operational"))


def identity(config: Config) -> dict[str, object]:
    """The part of a config that decides a stage's result: all but operational and, at their default, `added` fields."""
    kept: dict[str, object] = {}
    for name, field in type(config).model_fields.items():
        if is_operational(field) and name not in config.deciding():
            continue
        value = getattr(config, name)
        if _is_added(field) and value == field.default:
            continue
        kept[name] = identity(value) if isinstance(value, Config) else _jsonable(value)
    return kept


def digest(value: object) -> str:
    """SHA-256 of a JSON-able value in its canonical form (sorted keys, no spaces)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _jsonable(value: object) -> object:
    if isinstance(value, Config):
        return identity(value)
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Nested dicts and lists as one level of dotted keys, e.g. `{"transformer.layers": 8}`."""
    if isinstance(value, dict):
        items: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: object, new: object) -> list[str]:
    """What changed between two nested configs, a line per key: `layers: 4 -> 8`."""
    before, after = flatten(old), flatten(new)
    return [
        mask(f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}")
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]


def load_config(
    cls: type[ConfigT],
    path: str | Path,
    overrides: Sequence[str] = (),
    clean: Callable[[dict[str, object]], dict[str, object]] | None = None,
) -> ConfigT:
    """Read a YAML file, apply dotted overrides, validate. `clean` changes the file's values before the overrides do.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path's, False for a name that is too long
        raise UserError(f"no config at {path}: expected a YAML file (see configs/ for examples)")
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: expected text in UTF-8 ({error})") from error
    values = read_yaml(text, str(path))
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    values = _apart(values)
    if clean is not None:
        values = clean(values)
    for override in overrides:
        _apply_override(values, override)
    return parse_config(cls, values, where=str(path))


def _apart(values: Any) -> Any:
    """A copy in which what a YAML alias named in two places is two: an override changes the one that it names."""
    if isinstance(values, dict):
        return {key: _apart(value) for key, value in values.items()}
    return [_apart(value) for value in values] if isinstance(values, list) else values


def parse_config(cls: type[ConfigT], values: dict[str, object], where: str) -> ConfigT:
    """Validate plain values against `cls`; `where` names their origin in errors."""
    renamed: dict[str, str] = {}
    values = with_current_names(values, renamed)
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(explain(cls, e) for e in error.errors())) from error
    for key, value in flatten(config.model_dump(warnings=False)).items():
        if any(abs(number) > LARGEST_INTEGER for number in _integers(value)):
            raise UserError(f"{where}: '{key}': expected integers below 2**63, found a larger one")
    for old, new in renamed.items():  # of a config that is refused, the error alone is told
        log.warning("%s: key '%s' is now '%s'; the old name still works in this version: rename it", where, old, new)
    return config


def _integers(value: object) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [number for number in values if isinstance(number, int)]


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(values: dict[str, object], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise UserError(f"override '{override}': expected key=value, e.g. transformer.layers=8")
    value = read_value(text, f"override '{override}': the value")
    node: object = values
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, key, override)]
        elif isinstance(node, dict):
            if node.get(key) is None:  # left out, or null, as a run's own config has what is not set
                node[key] = {}
            node = node[key]
        if not isinstance(node, (dict, list)):
            raise UserError(f"override '{override}': {'.'.join(keys[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_list_index(node, keys[-1], override)] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value


def _list_index(items: Sequence[object], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise UserError(f"override '{override}': expected an index below {len(items)}, found '{key}'")
    return int(key)


def nested_classes(annotation: object) -> list[type[Config]]:
    """The config classes that a type mentions: `A | B | None` gives A and B."""
    return [model for model in nested_models(annotation) if issubclass(model, Config)]
