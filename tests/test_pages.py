"""What the pages of docs/ promise beyond names (test_docs.py): commands parse; formulas, messages are in the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import shutil
import tarfile
import tomllib
from pathlib import Path

import click
import pytest

import pipeline
from pipeline.cli import python_reference
from pipeline.cli.main import cli
from pipeline.config.pipeline import load_pipeline
from pipeline.config.renamed import RENAMED
from tests.launch import ROOT, launch
from tests.prose_and_tree import sources, walk

PAGES = sorted((ROOT / "docs").glob("*.md"))
ANY = re.compile(r"<\w+>|…|\[|\|")  # in a line that stands for several commands


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def _commands() -> list[list[str]]:
    """The words of every `smalti …` line that is whole."""
    texts = [page.read_text().replace("\\\n", " ") for page in PAGES]
    lines = [line for text in texts for line in re.findall(r"^    (?:\$ )?smalti (.*)$", text, re.MULTILINE)]
    return [shlex.split(line, comments=True) for line in lines if not ANY.search(line.partition("#")[0])]


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_a_command_of_a_page_is_understood(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command: click.Command | None = cli
    context, rest = cli.make_context("smalti", list(words)), list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, list(rest), parent=context)
    overrides = [str(word) for word in context.params.get("overrides") or () if "=" in str(word)]
    if overrides:
        # A config of a page's own making, or a run: the demo's stands in.
        demo = ROOT / "configs" / "openmoji.yaml"
        named = [path for path in map(ROOT.joinpath, words) if path.parent == demo.parent and path.is_file()]
        load_pipeline([*named, demo][0], overrides)


# What is not run here, by how it begins or what is in it, and why.
NOT_RUN = {
    "serve": "tests/serving", "ui": "has no end", "--watch": "has no end",
    "submit": "tests/slurm", "resubmit": "tests/slurm", "cancel": "tests/slurm", "logs": "tests/slurm",
    "doctor": "tests/doctor", "plan": "tests/training",
    "run": "trains: tests/orchestration, tests/training", "evaluate --config": "takes the run of the demo",
    "report --config": "takes the run of the demo", "inception-v3": "needs weights that have no package",
    "--best": "needs a sweep", "--keep": "needs a reranker", "--step": "needs a checkpoint of the demo",
    "data push": "needs a store: tests/data",
}  # fmt: skip


def _is_run(words: list[str]) -> bool:
    begins = [words[: len(own.split())] == own.split() or own in words[1:] for own in NOT_RUN]
    return words == ["run", "runs/openmoji", "--dry-run"] or not any(begins)


def test_commands_of_the_pages_do_what_they_say_in_a_tiny_run(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("openmoji", "mine", "six", "a", "b"):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "prompts.txt").write_text("joker\n")
    for folder in ("photos", "FOLDER"):
        shutil.copytree(tiny_run / "generate" / "prompts", tmp_path / folder)
    with tarfile.open(tmp_path / "theirs.tar", "w") as tar:
        for image in (tmp_path / "photos").iterdir():
            tar.add(image, image.name)
    unlike = {tuple(words): words for words in _commands() if _is_run(words)}
    assert len(unlike) >= 16
    said = launch("tests.pages_worker", json.dumps(list(unlike.values())), cwd=tmp_path)
    assert not re.findall("^FAILED .*", said, re.MULTILINE)
    for made in (
        "sheet.png",
        "look",
        "hearts.png",
        "compared.html",
        "exported/pipeline.json",
        "rebuilt",
        "samples.npz",
    ):
        assert (tmp_path / made).exists(), made


def _symbols(path: Path) -> set[str]:
    """Functions, classes and `Class.method`s of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_formula_stands_beside_the_function_that_computes_it() -> None:
    _, *after = re.split(r"^```math\n", _page("how-it-works.md"), flags=re.MULTILINE)
    assert len(after) >= 20
    for formula, _, prose in (text.partition("\n```\n") for text in after):
        named = re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", prose)
        assert named, formula
        for symbol, path in named:
            assert symbol in _symbols(ROOT / path), f"{symbol} is not in {path}"


def test_every_source_that_a_formula_names_is_listed() -> None:
    text, _, listed = _page("how-it-works.md").partition("## Sources")
    prose = re.sub(r"^```math.*?^```$|\$[^$]*\$", "", text, flags=re.MULTILINE | re.DOTALL)
    brackets = re.findall(r"\[(\d[^\]]*)\](?!\()", prose)
    numbers = {number for named in brackets for number in re.findall(r"(?:^|; )(\d+)", named)}
    assert numbers == set(re.findall(r"^(\d+)\. ", listed, re.MULTILINE))


def _told() -> list[list[str]]:
    """For each string in the code that is no docstring: what is in it between values."""
    found = []
    for path in sources():
        if path.relative_to(ROOT).parts[0] == "pipeline":
            for node in walk(path):
                if isinstance(node, ast.JoinedStr):
                    found.append([str(part.value) for part in node.values if isinstance(part, ast.Constant)])
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append([node.value])
    return found


def test_every_message_that_troubleshooting_explains_is_one_that_the_code_prints() -> None:
    """A message is in double quotes, with … for values."""
    rows = re.findall(r"^\| (.*?) \|", _page("troubleshooting.md"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r'"([^"]+)"', row)]
    assert len(messages) >= 30
    told = _told()
    printed = [" ".join("…".join(parts).split()) for parts in told]
    missing = []
    for message in messages:
        fragments = [fragment.strip() for fragment in message.split("…") if fragment.strip(" (),.:;'")]
        pattern = re.compile(".*".join(map(re.escape, fragments)))
        if not any(pattern.search(text) for text in printed):
            missing.append(message)
    assert missing == []


def test_migration_lists_every_key_that_has_a_new_name() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", _page("migration.md"), re.MULTILINE)
    assert dict(rows) == RENAMED


def test_the_python_of_the_api_page_runs(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "\n".join(re.findall(r"^```python\n(.*?)^```$", _page("python-api.md"), re.MULTILINE | re.DOTALL))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "openmoji").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "python-api.md", "exec"), {})
    assert {path.name for path in tmp_path.glob("*.png")} == {"0-0.png", "0-1.png", "1-0.png", "1-1.png"}


def test_every_public_name_is_documented_from_its_docstring() -> None:
    assert _page("python-reference.md") == python_reference.page(), "run make docs"
    public = [getattr(pipeline, name) for name in pipeline.__all__ if name != "__version__"]
    assert public == python_reference.CLASSES
    for one in (*public, *python_reference.THEIRS):
        for name, member in {"": one, **python_reference.members(one)}.items():
            assert inspect.getdoc(member), f"{one.__name__}.{name}"


def test_every_page_is_on_the_map_and_on_the_site() -> None:
    names = {page.name for page in PAGES} - {"index.md"}
    assert names <= set(re.findall(r"\]\(([\w-]+\.md)", _page("index.md")))
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert {page for section in nav for pages in section.values() for page in pages} == names | {"index.md"}
