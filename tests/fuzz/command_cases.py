"""Malformed configs, command lines and run directories, through the real `main` in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import sys
from pathlib import Path
from random import Random
from unittest.mock import patch

from pipeline.cli.main import main
from tests.conftest import TINY
from tests.fuzz.data_cases import Finding
from tests.fuzz.mutations import mutated

_ALLOWED = (0, 2)
_CLUSTER = TINY.parents[2] / "configs" / "cluster" / "example.yaml"
_WORDS = (
    "", "-", "--", "-n", "0", "-1", "-8", "8", "1e9", "1e400", "nan", "yes", "null", "x" * 300, "é", "a\nb",
    "\x1b[31m", "~", "/proc/x.png", "/dev/null", "/nowhere/a", "..", ".", "[", "{}", "{", "a=b", "name=",
    "name=../x", "runs=/sys", "seed=-1", "seed=9999999999999999999", "transformer.layers=0", "transformer.layers=x",
    "transformer=3", "transformer.training.steps=", "image_tokenizer.model.kind=x", "prepare.source={kind: folder}",
    "prepare.source.limit=-3", "generate.samples=1.5", "prepare.image_size=17",
    "transformer.training.micro_batch_size=-8", "prepare.filters=[1]", "report.title=a # b", "--seed", "--config",
    "--only", "--from", "--dry-run", "--print-config", "--take-over", "--gpus", "--steps", "--help", "-o", "--json",
    "--real", "--fake", "--top-k", "--temperature", "--guidance", "--split", "transformer", "prepare",
)  # fmt: skip
# What starts neither a training nor a server, nor asks a scheduler.
_COMMANDS = ("run", "status", "export", "plan", "data", "evaluate", "generate", "reconstruct", "logs", "xyz", "submit")


def run_main(*arguments: str) -> tuple[int, str]:
    """Exit code and output of `smalti ARGUMENTS`; an exception but SystemExit goes on."""
    output = io.StringIO()
    with (
        patch.object(sys, "argv", ["smalti", *arguments]),
        patch.object(os, "_exit", side_effect=SystemExit),  # how a stage ends its process
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return code, output.getvalue()


def _check(code: int, output: str, arguments: list[str]) -> None:
    said = f"smalti {' '.join(arguments)!r}: exit {code}: {output[-600:]!r}"
    if "Traceback" in output:
        raise Finding(f"a traceback: {said}")
    if code not in _ALLOWED:
        raise Finding(f"exit {code}: {said}")
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    if code == 2 and len(lines) != 1:
        raise Finding(f"exit 2 without one line: {said}")


def config(folder: Path, rng: Random) -> None:
    """A config file, damaged anywhere."""
    (folder / "config.yaml").write_bytes(mutated(TINY.read_bytes(), rng))
    arguments = ["run", str(folder / "config.yaml"), "--print-config", *rng.sample(_WORDS, rng.choice((0, 0, 1)))]
    _check(*run_main(*arguments), arguments)


def cluster(folder: Path, rng: Random) -> None:
    """A cluster file, damaged anywhere."""
    (folder / "cluster.yaml").write_bytes(mutated(_CLUSTER.read_bytes(), rng))
    arguments = ["submit", str(TINY), "--cluster", str(folder / "cluster.yaml"), "--dry-run", f"runs={folder}"]
    _check(*run_main(*arguments), arguments)


def command_line(folder: Path, rng: Random) -> None:
    """Words of all commands in any order."""
    command = rng.choice(_COMMANDS)
    places = (str(TINY), str(folder), str(folder / "none"), str(folder / "file"))
    (folder / "file").write_bytes(b"\x00junk")
    words = [rng.choice((*_WORDS, *places)) for _ in range(rng.randrange(6))]
    # A run of everything would train: it says what it would do.
    harmless = {"run": ["--dry-run", f"runs={folder}"], "submit": ["--dry-run", f"runs={folder}"]}.get(command, [])
    arguments = [command, *words, *harmless]
    if command == "data":
        arguments.insert(1, rng.choice(("inspect", "export", "x")))
    before = snapshot(folder)
    with contextlib.chdir(folder):
        code, output = run_main(*arguments)
    _check(code, output, arguments)
    if code == 2 and snapshot(folder) != before:
        raise Finding(f"a refused command wrote something: {arguments}: {_changed(before, snapshot(folder))}")


def run_directory(folder: Path, rng: Random, original: Path) -> None:
    """A finished run with one damaged or missing file, and a command that reads it."""
    run = folder / "run"
    shutil.copytree(
        original, run, ignore=shutil.ignore_patterns("mlartifacts", "mlflow.db", "checkpoints", "src", "*.patch")
    )
    files = sorted(path for path in run.rglob("*") if path.is_file())
    near = [path for path in files if path.suffix in (".json", ".yaml", ".jsonl") or path.name == "_SUCCESS"]
    for _ in range(rng.choice((1, 1, 2))):
        victim = rng.choice(near if rng.random() < 0.8 else files)
        if rng.random() < 0.2:
            victim.unlink(missing_ok=True)
        elif victim.exists():
            victim.write_bytes(mutated(victim.read_bytes(), rng))
    arguments = rng.choice(
        (
            ["status", str(run)],
            ["status", str(run), "--json"],
            ["run", str(run), "--dry-run"],
            ["run", str(run / "config.yaml"), "--dry-run", "transformer.layers=3"],
            ["data", "inspect", str(run)],
            ["export", str(run), str(folder / "exported")],
            ["logs", str(run), "transformer"],
            ["generate", str(run), "red heart", "-n", "1", "-o", str(folder / "images")],
        )
    )
    before = snapshot(run)
    code, output = run_main(*arguments)
    _check(code, output, arguments)
    if code == 2 and snapshot(run) != before:
        raise Finding(f"a refused command changed the run directory: {arguments}: {_changed(before, snapshot(run))}")


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content. Locks that are left empty folders do not count."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
