"""The reference of config keys as Markdown, from the config classes themselves.

`python -m pipeline.cli.config_reference > docs/config.md` writes it for the pipeline config and the cluster file.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config.base import Config, is_operational, nested_classes

_BOUNDS: dict[type, tuple[str, str]] = {  # constraint -> its symbol and attribute
    annotated_types.Ge: ("≥", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("≤", "le"),
    annotated_types.Lt: ("<", "lt"),
    annotated_types.MultipleOf: ("a multiple of", "multiple_of"),
}


@dataclass
class Section:
    """A config class, where it stands in a file, and whether its keys change results."""

    cls: type[Config]
    heading: str
    paths: list[str] = field(default_factory=list)
    changes_results: bool = False

    @property
    def anchor(self) -> str:
        """The fragment that GitHub makes of the heading."""
        return re.sub(r"[^\w\- ]", "", self.heading.lower()).replace(" ", "-")


def reference(cls: type[Config], title: str, changes_results: bool) -> str:
    """A heading and a table of keys for `cls` and every config class inside it, each class once.

    `changes_results`: whether its keys do that, but for operational ones.
    """
    sections: dict[type[Config], Section] = {}
    _collect(cls, "", changes_results, sections)
    sections[cls].heading = title
    return "\n".join(_table(section, sections) for section in sections.values())


def _collect(cls: type[Config], path: str, changes_results: bool, found: dict[type[Config], Section]) -> None:
    kind = cls.model_fields.get("kind")
    suffix = f", kind: {get_args(kind.annotation)[0]}" if kind else ""
    section = found.setdefault(cls, Section(cls, path + suffix))
    section.paths.append(path + suffix)
    section.changes_results |= changes_results
    for name, info in cls.model_fields.items():
        for inner in nested_classes(info.annotation):
            _collect(inner, f"{path}.{name}".lstrip("."), changes_results and not is_operational(info), found)


def _table(section: Section, sections: dict[type[Config], Section]) -> str:
    lines = [f"{'##' if not section.paths[0] else '###'} {section.heading}", "", _first_paragraph(section.cls), ""]
    if others := [path for path in dict.fromkeys(section.paths) if path != section.heading and path]:
        lines += [f"The same keys at {', '.join(f'`{path}`' for path in others)}.", ""]
    lines += ["| key | type | default | meaning | changes results |", "|---|---|---|---|---|"]
    for name, info in section.cls.model_fields.items():
        changes = "yes" if section.changes_results and not is_operational(info) else "no"
        if isinstance(info.json_schema_extra, dict) and "decides" in info.json_schema_extra:
            changes = f"of {info.json_schema_extra['decides']}"
        cells = [
            f"`{name}`",
            _type(info.annotation, info.metadata, sections),
            _default(info),
            meaning(section.cls, name),
        ]
        lines.append("| " + " | ".join([*(cell.replace("|", "\\|") for cell in cells), changes]) + " |")
    return "\n".join([*lines, ""])


def meaning(cls: type[Config], name: str) -> str:
    """What a key means: its description, here or in a base class; of a section, what its class is. Empty if missing."""
    described = [
        base.model_fields[name] for base in cls.__mro__ if issubclass(base, Config) and name in base.model_fields
    ]
    if text := next((info.description for info in described if info.description), None):
        return re.sub(r"\bNone\b", "null", text)
    if name == "kind":
        return "chooses this table of keys"
    inner = nested_classes(cls.model_fields[name].annotation)
    if len(inner) == 1:
        return re.split(r"(?<!al)[.;] ", _first_paragraph(inner[0]))[0].rstrip(".")
    return "one of these kinds" if inner else ""


def _first_paragraph(cls: type[Config]) -> str:
    """The first paragraph of the docstring, without its "Section `x`: "."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    text = re.sub(r"^Section `\w+`[^:.]*: ", "", text)
    return text[:1].upper() + text[1:]


def _type(annotation: object, metadata: Sequence[object], sections: dict[type[Config], Section]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*_flat(arguments[1:]), *metadata], sections)
    bounds = " and".join(f" {bound}" for bound in _bounds(metadata))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        some = [argument for argument in arguments if argument is not NoneType]
        names = ", ".join(_type(argument, [], sections) for argument in some)
        return f"{names}{bounds}" + (" or null" if len(some) < len(arguments) else "")
    if origin in (list, tuple):
        items = [_type(argument, [], sections) for argument in arguments if argument is not ...]
        several = f"{len(items)} × " if len(items) > 1 else ""  # a tuple of fixed length
        return f"list of {several}{items[0]}"
    if origin is dict:
        return f"{_type(arguments[1], [], sections)}, by name"
    if isinstance(annotation, type) and annotation in sections:
        section = sections[annotation]
        return f"[{section.heading}](#{section.anchor})"
    plain: dict[object, str] = {bool: "true or false", str: "text", Path: "path", int: "integer", float: "number"}
    return plain.get(annotation, str(annotation)) + bounds


def _flat(metadata: Sequence[object]) -> Iterator[object]:
    for entry in metadata:
        yield from entry.metadata if isinstance(entry, FieldInfo) else [entry]


def _bounds(metadata: Sequence[object]) -> Iterator[str]:
    for constraint in metadata:
        if type(constraint) in _BOUNDS:
            symbol, attribute = _BOUNDS[type(constraint)]
            yield f"{symbol} {getattr(constraint, attribute):g}"


def _default(info: FieldInfo) -> str:
    if info.default_factory in (list, dict):
        return "`[]`" if info.default_factory is list else "`{}`"
    if info.default_factory is not None:
        return "see there"
    if info.default is PydanticUndefined:
        return "required"
    return f"`{_yaml(_plain(info.default))}`"


def _plain(value: object) -> object:
    """A default as plain values; of a section only what differs from the section's own defaults."""
    if isinstance(value, Config):
        own = {name: info.default for name, info in type(value).model_fields.items()}
        values = {name: getattr(value, name) for name in own}
        return {name: _plain(found) for name, found in values.items() if name == "kind" or found != own[name]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _yaml(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()
