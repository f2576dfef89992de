"""Whatever stands behind a config key or an option: a config that loads, or exit 2 with one line. Never a traceback."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.cli.main import cli, main
from pipeline.config.base import Config, nested_classes
from pipeline.config.pipeline import PipelineConfig
from pipeline.core import distributed
from tests.launch import ROOT

pytestmark = pytest.mark.slow
TINY = ROOT / "tests" / "configs" / "tiny.yaml"
MANY = settings(  # the same examples each time
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def keys(cls: type[Config], path: str = "") -> Iterator[str]:
    """Every key of a config, with the keys of all kinds where a section has several."""
    for name, field in cls.model_fields.items():
        yield f"{path}{name}"
        for inner in nested_classes(field.annotation):
            yield from keys(inner, f"{path}{name}.")


KEYS = sorted(set(keys(PipelineConfig)))
# What argv can hold: no NUL.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.5, 1e-300, 1e308]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXT, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture
def smalti(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Any]:
    """Runs the real main() in this process, in an empty folder; a stage that ends its process ends the call."""

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(distributed, "leave", leave)
    monkeypatch.setattr("pipeline.core.signals.install", lambda: None)
    monkeypatch.setattr("pipeline.core.signals.ignore", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert logging.lastResort is not None
    logging.getLogger().addHandler(logging.lastResort)  # where pytest listens, too

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["smalti", *arguments])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    logging.getLogger().removeHandler(logging.lastResort)


def holds(code: int, out: str, err: str) -> None:
    """A config was printed, or one line says why not."""
    if code == 0:
        PipelineConfig.model_validate(yaml.safe_load(out))
        return
    assert code == 2, err
    assert err.startswith("error: "), err
    assert len(err.splitlines()) == 1, err
    assert len(err) < 2000, err


@MANY
@given(key=st.sampled_from(KEYS), value=st.one_of(TEXT, VALUES.map(lambda value: json.dumps(value))))
@example(key="transformer.training.micro_batch_size", value="-8")
@example(key="seed", value=str(2**63))
def test_any_override_loads_or_is_one_line(smalti: Any, key: str, value: str) -> None:
    holds(*smalti("run", str(TINY), "--print-config", f"{key}={value}"))


@MANY
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_in_a_file_loads_or_is_one_line(smalti: Any, tmp_path: Path, key: str, value: object) -> None:
    values = yaml.safe_load(TINY.read_text())
    node, (*parents, last) = values, key.split(".")
    for parent in parents:
        below = node.get(parent)
        node[parent] = below if isinstance(below, dict) else {}
        node = node[parent]
    node[last] = value
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values, allow_unicode=True))
    holds(*smalti("run", str(file), "--print-config"))


@MANY
@given(text=st.one_of(st.binary(max_size=60), TEXT.map(str.encode), VALUES.map(lambda v: yaml.safe_dump(v).encode())))
def test_any_file_loads_or_is_one_line(smalti: Any, tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    holds(*smalti("run", str(file), "--print-config"))


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def options() -> list[tuple[tuple[str, ...], str, int]]:
    """Every option of every command: the command's words, the option, and how many values it takes.

    But for the doctor's, to whom a mistake is one finding of several (tests/doctor).
    """
    return [
        (path, max(parameter.opts, key=len), 0 if parameter.is_flag else parameter.nargs)
        for path, command in commands(cli)
        for parameter in command.params
        if isinstance(parameter, click.Option) and path != ("doctor",)
    ]


def arguments_of(path: tuple[str, ...]) -> list[str]:
    """Its arguments: places that do not exist, so that no command starts work."""
    command: Any = cli
    for name in path:
        command = command.commands[name]
    count = sum(isinstance(parameter, click.Argument) for parameter in command.params)
    return [f"nowhere-{index}" for index in range(count)]


@settings(MANY, max_examples=400)
@given(option=st.sampled_from(options()), values=st.lists(st.one_of(TEXT, NUMBERS.map(str)), min_size=2, max_size=2))
def test_any_value_of_any_option_is_one_line(
    smalti: Any, option: tuple[tuple[str, ...], str, int], values: list[str]
) -> None:
    path, name, nargs = option
    given_values = [f"{name}={values[0]}"] if nargs == 1 else [name, *values[:nargs]]
    there = set(Path.cwd().iterdir())
    code, out, err = smalti(*path, *given_values, *arguments_of(path))
    assert code == 2, (code, out, err)
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err
    made = set(Path.cwd().iterdir()) - there  # the folder that was asked for: places are tried before the work
    assert not [path for folder in made for path in (folder, *folder.rglob("*")) if path.is_file()], (
        "a refused command wrote"
    )


@MANY
@given(words=st.lists(st.one_of(TEXT, st.sampled_from(sorted({*cli.commands} - {"doctor"}))), min_size=1, max_size=3))
def test_any_words_are_one_line(smalti: Any, words: list[str]) -> None:
    code, _, err = smalti(*words)
    assert code == 2 or words[0] in ("-h", "--help", "--version"), err
    assert len(err.splitlines()) == 1 or code == 0 or "Usage" in err, err
