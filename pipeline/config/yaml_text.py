"""YAML as people mean it: keys once, dates and 2024_01_05 as text, and a value of the command line as it is typed.

read_yaml("steps: 3\nsteps: 4\n", "a.yaml")    # UserError: a.yaml: 'steps' stands twice, in lines 1 and 2; keep one
read_value("Run #5 of May")                    # "Run #5 of May": no comment
read_value("[1, 2e-3]"), read_value("null")    # [1, 0.002], None
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from pipeline.core.errors import UserError

_MAX_ENTRIES = 1_000_000  # keys and values of a file, aliases written out
_INT = re.compile(r"[-+]?(?:0b[01]+|0x[0-9a-fA-F]+|0|[1-9][0-9]*|0[0-7]+)\Z")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?\Z|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)
_SCIENTIFIC = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+\Z")
_TAG = "tag:yaml.org,2002:"
_PLAIN = [f"{_TAG}{kind}" for kind in ("int", "float", "bool", "null")]


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which a key that stands twice is an error and only what looks like a number is one."""

    # YAML 1.1 also takes 2024_01_05 and 12:30:00 for integers, and 2024-01-05 for a date.
    yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] not in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"lines {lines[key.value]} and {line}" if line != lines[key.value] else f"line {line}"
                raise _Twice(f"'{key.value}' stands twice, in {where}; keep one")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _Twice(Exception):
    """A key stands twice in a section."""


_Loader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str, where: str) -> object:
    """The values of a YAML text; `where` names its origin in errors.

    Raises:
        UserError: it is not YAML, a key stands twice, or it is larger than any config.
    """
    try:
        values: object = yaml.load(text, Loader=_Loader)
        if _entries(values, {}) > _MAX_ENTRIES:
            raise UserError(f"{where}: expected a config, found more than {_MAX_ENTRIES:,} entries")
    except _Twice as error:
        raise UserError(f"{where}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply, or an alias that holds itself") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    return values


def read_value(text: str, where: str) -> object:
    """The value of a command line's `key=text`: a number, true, null, a list or mapping in brackets; all else is text.

    Raises:
        UserError: it begins like a list or mapping, and is none; `where` names it.
    """
    text = text.strip()
    if text[:1] in ("[", "{"):
        return read_yaml(text, where)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return read_yaml(text, where)
    if _SCIENTIFIC.match(text):  # YAML 1.1 wants 1.0e-3; people write 1e-3
        return float(text)
    loader: Any = _Loader("")  # PyYAML's resolver has no types
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        if tag not in _PLAIN:  # `=`, `<<`, `!`, which mean something in a file alone
            return text
        return loader.construct_object(yaml.ScalarNode(tag, text))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _entries(value: object, known: dict[int, int]) -> int:
    """How many keys and values `value` has when each alias is written out, in time of those that are written."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_entries(item, known) for item in items)
    return known[id(value)]
