"""Typed configuration: YAML file + dotted overrides -> frozen pydantic models.

    config = load_config(PipelineConfig, "configs/openmoji.yaml", ["transformer.layers=8"])

Unknown keys are errors that name the key and its nearest neighbour. There is a module
for each section; `pipeline.py` puts them together. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config.renamed import with_current_names
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)


class Config(BaseModel):
    """The base of every config class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


ConfigT = TypeVar("ConfigT", bound=Config)


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how a stage runs but never what it makes (logging intervals, workers).

    Such fields are left out of `identity`, so changing one never makes a finished stage run again.
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
        if is_operational(field):
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
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "(absent)") != after.get(key, "(absent)")
    ]


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file, apply dotted overrides, validate.

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
    for override in overrides:
        _apply_override(values, override)
    return parse_config(cls, values, where=str(path))


def parse_config(cls: type[ConfigT], values: dict[str, object], where: str) -> ConfigT:
    """Validate plain values against `cls`; `where` names their origin in errors."""
    renamed: dict[str, str] = {}
    values = with_current_names(values, renamed)
    for old, new in renamed.items():
        log.warning("%s: key '%s' is now '%s'; the old name still works in this version: rename it", where, old, new)
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(explain(cls, e) for e in error.errors())) from error


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
            node = node.setdefault(key, {})
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
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [found for argument in get_args(annotation) for found in nested_classes(argument)]
