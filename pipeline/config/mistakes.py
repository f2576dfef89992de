"""What is wrong with a config's values, a line per mistake: the key, what was expected, what was found."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

LARGEST_INTEGER = 2**63 - 1
_SHOWN = 120  # characters of a value

Model = type[BaseModel]


def explain(cls: Model, error: ErrorDetails) -> str:
    """One line for an error that pydantic found in values for `cls`."""
    keys, beside = _located(cls, [str(part) for part in error["loc"]])
    dotted = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return f"unknown key '{dotted}'; {_hint(keys, beside)}"
    if error["type"] == "missing":
        return f"key '{dotted}' is missing"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"'{dotted}': expected a section of keys, found {shown(error['input'])}"
    if error["type"] == "union_tag_not_found":
        kinds = sorted(kind for model in _last(cls, keys) for kind in _kinds(model))
        return f"'{dotted}': expected a section with a kind ({', '.join(kinds)}), found {shown(error['input'])}"
    if error["type"] == "string_type" and isinstance(error["input"], (bool, int, float)):
        return f"'{dotted}': expected text, found {shown(error['input'])}: put it in quotes{_quotes(error['input'])}"
    message = error["msg"].removeprefix("Value error, ")
    return f"'{dotted}': {message}, found {shown(error['input'])}" if dotted else message


def shown(value: object) -> str:
    """A value on one line, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def nested_models(annotation: object) -> list[Model]:
    """The pydantic models that a type mentions: `A | B | None` gives A and B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in nested_models(argument)]


def _quotes(value: object) -> str:
    """How it is put in quotes. YAML reads yes, no, on and off as true and false."""
    if isinstance(value, bool):
        return ", e.g. 'yes'" if value else ", e.g. 'no'"
    return f", '{shown(value)}'"


def _hint(keys: list[str], beside: list[Model]) -> str:
    known = sorted({name for model in beside for name in model.model_fields})
    parent = ".".join(keys[:-1])
    near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{parent + '.' if parent else ''}{near[0]}'?"
    return f"known here: {', '.join(known)}"


def _located(cls: Model, location: list[str]) -> tuple[list[str], list[Model]]:
    """The keys of an error's location, and the classes whose fields may stand where its last key was found.

    Pydantic puts the tag of a discriminated union into the location; it is no key, and chooses the class.
    """
    keys: list[str] = []
    candidates = [cls]
    for index, part in enumerate(location):
        tagged = [model for model in candidates if part in _kinds(model)]
        if tagged and not any(part in model.model_fields for model in candidates):
            candidates = tagged
            continue
        keys.append(part)
        if index < len(location) - 1:
            candidates = _following(candidates, part) or candidates
    return keys, candidates


def _last(cls: Model, keys: list[str]) -> list[Model]:
    """The classes that may stand at `keys`."""
    candidates = [cls]
    for key in keys:
        candidates = _following(candidates, key) or candidates
    return candidates


def _following(candidates: list[Model], key: str) -> list[Model]:
    fields = [model.model_fields[key] for model in candidates if key in model.model_fields]
    return [found for field in fields for found in nested_models(field.annotation)]


def _kinds(model: Model) -> tuple[str, ...]:
    """What `kind` may be in this class of a union."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field else ()
