"""The workflows, the hooks before a commit and the citation say what the project has."""

from __future__ import annotations

import re
import tomllib
import typing
from pathlib import Path

import yaml

from pipeline.core.version import VERSION
from tests.launch import ROOT


def test_the_workflows_run_targets_and_markers_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    markers = [line.partition(":")[0] for line in _pyproject()["tool"]["pytest"]["ini_options"]["markers"]]
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        for target in re.findall(r"^make (\S+)$", "\n".join(commands), flags=re.MULTILINE):
            assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), f"no target {target}"
        for expression in re.findall(r'-m "([^"]+)"|-m (\w+)', "\n".join(commands)):
            assert set(" ".join(expression).split()) - {"and", "not", "or"} <= set(markers)


def test_the_hooks_before_a_commit_are_the_tools_of_the_project() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    tools = [Path(hook["entry"].split()[0]).name for repo in repos for hook in repo["hooks"] if "entry" in hook]
    makefile = (ROOT / "Makefile").read_text()
    assert [tool for tool in tools if f"$(BIN)/{tool}" not in makefile] == []


def test_the_citation_is_of_this_package() -> None:
    citation, project = yaml.safe_load((ROOT / "CITATION.cff").read_text()), _pyproject()["project"]
    assert citation["version"] == VERSION
    assert citation["license"] == project["license"]


def _pyproject() -> dict[str, typing.Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
