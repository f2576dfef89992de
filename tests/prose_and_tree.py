"""What the docs say, and what the tree has: pages, docstrings and comments; files, names, config keys."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from pipeline.config.pipeline import PipelineConfig
from tests.launch import ROOT

PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "slurm/README.md"]
FOLDERS = ("pipeline", "stages", "docs", "tests", "configs", "slurm", "benchmarks")


# What is read


@cache
def sources() -> list[Path]:
    """Every Python file of ours."""
    return sorted(path for top in ("pipeline", "stages", "benchmarks", "tests") for path in (ROOT / top).rglob("*.py"))


@cache
def texts() -> dict[str, str]:
    """By file: a page's text, or the docstrings and comments of a module."""
    pages = [ROOT / name for name in PAGES if (ROOT / name).exists()] + sorted((ROOT / "docs").glob("*.md"))
    prose = {str(page.relative_to(ROOT)): page.read_text() for page in pages}
    for path in sources():
        if path.relative_to(ROOT).parts[0] in ("pipeline", "stages", "benchmarks"):
            prose[str(path.relative_to(ROOT))] = "\n".join([*docstrings(path), *comments(path)])
    return prose


@cache
def walk(path: Path) -> list[ast.AST]:
    """The module, and all that is in it."""
    return list(ast.walk(ast.parse(path.read_text())))


def docstrings(path: Path) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in walk(path) if isinstance(node, documented) if (text := ast.get_docstring(node))]


def comments(path: Path) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@cache
def quoted() -> list[tuple[str, str]]:
    """Everything in single backticks, on one line or broken over two, with its file."""
    found = []
    for name, text in texts().items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        found += [(name, " ".join(words.split())) for words in re.findall(r"`([^`]+)`", prose)]
    return found


# What exists


@cache
def files() -> set[str]:
    """Paths of the tree, folders with a slash at the end."""
    found = set()
    for top in (*FOLDERS, ".github"):
        for path in (ROOT / top).rglob("*"):
            if "__pycache__" not in path.parts:
                found.add(str(path.relative_to(ROOT)) + ("/" if path.is_dir() else ""))
    return found | {f"{top}/" for top in FOLDERS} | {path.name for path in ROOT.iterdir() if path.is_file()}


@cache
def identifiers() -> set[str]:
    """Every name in the code, and every word of its strings that could be one; no comments, no docstrings."""
    found: set[str] = set()
    for path in sources():
        if path.name not in ("test_docs.py", "renamed.py"):  # the latter holds the names of before
            # Compiled without docstrings, which also takes a quarter of the time of a walk through the tree.
            found.update(_names(compile(path.read_text(), str(path), "exec", optimize=2, dont_inherit=True)))
    return found


def _names(constant: object) -> Iterator[str]:
    if isinstance(constant, types.CodeType):
        yield from (
            word for name in (*constant.co_names, *constant.co_varnames, constant.co_name) for word in name.split(".")
        )
        yield from (name for inner in constant.co_consts for name in _names(inner))
    elif isinstance(constant, (tuple, frozenset)):
        yield from (name for inner in constant for name in _names(inner))
    elif isinstance(constant, str):
        yield from re.findall(r"\w+", constant)


@cache
def members() -> dict[str, set[str]]:
    """By module (its last name) and by class, with its bases: the names that are defined in it, or set on self."""
    found: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path in sources():
        stem = path.parent.name if path.name == "__init__.py" else path.stem
        for node in walk(path):
            if isinstance(node, ast.Module):
                found.setdefault(stem, set()).update(_defined(node))
            elif isinstance(node, ast.ClassDef):
                own = found.setdefault(node.name, set())
                own.update(_defined(node))
                own.update(n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute))
                bases.setdefault(node.name, []).extend(base.id for base in node.bases if isinstance(base, ast.Name))
    for path in ROOT.glob("pipeline/**/"):
        found.setdefault(path.name, set()).update(child.stem for child in path.iterdir())
    for name in bases:
        above, waiting = {name}, list(bases[name])
        while waiting:
            above.add(base := waiting.pop())
            found[name] |= found.get(base, set())
            waiting += set(bases.get(base, [])) - above
    return found


def _defined(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)


@cache
def sections() -> list[type[BaseModel]]:
    """PipelineConfig and every config class below it."""
    found: list[type[BaseModel]] = []
    waiting: list[type[BaseModel]] = [PipelineConfig]
    while waiting:
        cls = waiting.pop(0)
        if cls not in found:
            found.append(cls)
            waiting += [inner for field in cls.model_fields.values() for inner in _models(field.annotation)]
    return found


def _models(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else types.NoneType):
        return _models(annotation.__value__)
    return [model for inner in typing.get_args(annotation) for model in _models(inner)]


def is_config_key(words: list[str]) -> bool:
    """Whether the dotted key leads somewhere from PipelineConfig, or from any section of it."""
    return any(_leads_on(cls, words) for cls in sections())


def _leads_on(cls: type[BaseModel], words: list[str]) -> bool:
    field = cls.model_fields.get(words[0])
    if field is None:
        return False
    return len(words) == 1 or any(_leads_on(inner, words[1:]) for inner in _models(field.annotation))
