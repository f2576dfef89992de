"""`python -m pipeline.cli.python_reference > docs/python-reference.md`: the public classes, from their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

import pipeline
from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.sampling.image_prompt import ImagePrompt
from pipeline.sampling.model_source import ModelSource
from pipeline.sampling.pipeline import Callbacks, GeneratedImage

_INTRODUCTION = """\
# Every public class

Made by `python -m pipeline.cli.python_reference > docs/python-reference.md`; change the docstrings instead. Examples
that run: [python-api.md](python-api.md). The first four are `from pipeline import …`; below them
what they take and give.
"""
CLASSES: list[type] = [getattr(pipeline, name) for name in pipeline.__all__ if name != "__version__"]
THEIRS: list[type] = [GeneratedImage, ImagePrompt, SamplingConfig, Callbacks, ModelSource, UserError]
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):$")


def page() -> str:
    """The text of docs/python-reference.md."""
    text = _INTRODUCTION + "".join(_of_class(one) for one in (*CLASSES, *THEIRS))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def members(one: type) -> dict[str, object]:
    """What a class itself has of public functions and properties."""
    kinds = (property, classmethod, staticmethod)
    named = {name: value for name, value in vars(one).items() if not name.startswith(("_", "model_"))}
    return {name: value for name, value in named.items() if isinstance(value, kinds) or inspect.isfunction(value)}


def _of_class(one: type) -> str:
    fields = dataclasses.is_dataclass(one) or hasattr(one, "model_fields")
    parts = [f"\n## {one.__name__}\n", f"In `{one.__module__}`.\n", rendered(inspect.getdoc(one) or "")]
    if fields:  # what it is made of is what it is made with
        parts.append(_call(one.__name__, inspect.signature(one), ""))
    for name, value in members(one).items():
        parts += [f"\n### {one.__name__}.{name}\n", _signature(name, value), rendered(inspect.getdoc(value) or "")]
    return "\n".join(parts)


def _signature(name: str, value: object) -> str:
    """As a block of code; of a property its type."""
    if isinstance(value, property):
        return f"```python\n{name}: {inspect.get_annotations(value.fget or page).get('return')}\n```\n"
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    assert callable(function)
    signature = inspect.signature(function)
    return _call(name, signature, f" -> {signature.return_annotation}")


def _call(name: str, signature: inspect.Signature, result: str) -> str:
    arguments: list[str] = []
    for each in signature.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        if each.name not in ("self", "cls"):
            arguments.append(re.sub(r"'([^']*)'", r"\1", str(each), count=1) if ": '" in str(each) else str(each))
    arguments = [each.replace("PosixPath('.')", "Path()").replace("typing.", "") for each in arguments]
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){result}"
    return f"```python\n{line}\n```\n"


def rendered(docstring: str) -> str:
    """A docstring as Markdown: its sections as lists, their shapes in [ ] as they are; what is indented is code."""
    return "\n".join(_lines(docstring)) + "\n"


def _lines(docstring: str) -> Iterator[str]:
    section, in_code = False, False
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            section = _SECTION.match(line) is not None
        if section and line.endswith(":") and not line.startswith(" "):
            yield f"**{line[:-1]}**\n"
        elif section and re.match(r"    \S", line):
            yield "- " + _escaped(line.strip())
        elif section:
            yield "  " + _escaped(line.strip()) if line.strip() else ""
        else:
            in_code = line.startswith("    ") or (in_code and not line.strip())
            yield line if in_code else _escaped(line)


def _escaped(line: str) -> str:
    """Without what Markdown would take for a tag, outside of code."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in parts)


if __name__ == "__main__":
    print(page(), end="")
