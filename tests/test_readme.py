"""The commands and the Python of README.md run as they stand there, on the tiny pipeline in place of the demo."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline.config.pipeline import load_pipeline
from tests.conftest import TINY
from tests.launch import ROOT, environment, launch

README = (ROOT / "README.md").read_text()
# What stands for an argument of the user's own choice, and a small choice.
CHOICES = {
    "a.b=c": "report.title=tiny",
    "<stage>": "text-tokenizer",
    "configs/openmoji.yaml": str(TINY),
    "configs/dalle-12b.yaml": str(ROOT / "configs" / "dalle-12b.yaml"),
    "photos/": "runs/tiny/prepare/train",
    "theirs.tar": "runs/tiny/generate/samples",
}
TESTED_ON_A_REAL_SLURM = {"submit", "status", "logs", "cancel", "resubmit"}  # tests/slurm/
TESTED_AS_SERVERS = {"ui", "serve"}  # tests/cli/test_main.py, tests/serving/


def _commands() -> list[list[str]]:
    lines = re.findall(r"^    smalti (.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    return [shlex.split(line) for line in lines]


def _runnable() -> list[list[str]]:
    return [words for words in _commands() if words[0] not in TESTED_ON_A_REAL_SLURM | TESTED_AS_SERVERS]


@pytest.mark.parametrize("words", _runnable(), ids=" ".join)
def test_a_command_of_the_readme_runs(words: list[str], tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "runs" / "tiny")
    chosen = [CHOICES.get(word, word).replace("runs/openmoji", "runs/tiny") for word in words]
    launch("pipeline", *chosen, cwd=tmp_path)
    for written in (chosen[i + 1] for i, word in enumerate(chosen) if word == "-o"):
        assert (tmp_path / written).exists()


def test_every_line_of_code_in_the_readme_is_of_a_kind_that_is_tried() -> None:
    outside = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^    (?=[a-z])(\S+)", outside, flags=re.MULTILINE)
    assert set(lines) - {"prepare"} == {"git", "make", "smalti"}  # `prepare`: the drawing of the graph
    assert ["ui", "runs/openmoji"] in _commands()
    assert re.findall(r"^```(\w+)$", README, flags=re.MULTILINE) == ["python", "yaml"]


def test_the_python_of_the_readme_runs(tiny_run: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    shutil.copytree(tiny_run, tmp_path / "runs" / "openmoji")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)
    expected = {f"{prompt}-{candidate}.png" for prompt in range(2) for candidate in range(4)}
    assert {path.name for path in tmp_path.glob("*.png")} == expected


def test_the_sources_of_the_readme_are_valid_configs(tmp_path: Path) -> None:
    (section,) = re.findall(r"^```yaml\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    lines = section.splitlines()
    sources = [line.replace("  # source", "  source") for line in lines if "source:" in line]
    assert len(sources) == 4
    tiny = yaml.safe_load(TINY.read_text())
    for source in sources:
        prepare = yaml.safe_load("\n".join([lines[0], source, lines[-1]]))["prepare"]
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(tiny | {"prepare": prepare}))
        assert load_pipeline(tmp_path / "own.yaml").prepare.source.kind == prepare["source"]["kind"]


def test_the_clone_line_names_the_repository_of_the_package() -> None:
    (url,) = re.findall(r"^    git clone (\S+) && cd smalti$", README, flags=re.MULTILINE)
    assert url in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"].values()
    assert url == yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^    make (\w+)", README, flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], env=environment(), capture_output=True, text=True
    )
    assert "run" in done.stdout
    assert "generate" in done.stdout
