"""The workflows, the hooks before a commit and the citation say what the project has."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

from pipeline.core.version import VERSION
from tests.launch import ROOT, environment


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


def _run_of(tests: str, programs: Path, *options: str, **variables: str) -> tuple[int, str]:
    """pytest's exit status and output, of tests that find no programs but those in a folder."""
    of_pytest = {"PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, tests]
    extra = {"SMALTI_NO_SKIPS": ""} | of_pytest | variables | {"PATH": str(programs)}
    done = subprocess.run(command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_tests_that_lack_a_package_fail_ci_and_are_named(tmp_path: Path) -> None:
    assert yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["env"]["SMALTI_NO_SKIPS"] == "1"
    pages = "tests/serving/test_page.py"
    assert _run_of(pages, tmp_path)[0] == 0
    for options in ((), ("-n", "1")):
        status, said = _run_of(pages, tmp_path, *options, SMALTI_NO_SKIPS="1")
        assert status == 1, said
        named = re.findall(rf"^{pages}::test_\S+: .*no Chromium: make browser-packages$", said, flags=re.MULTILINE)
        assert f"\n{len(named)} skipped" in said


@pytest.mark.slow
def test_tests_that_lack_what_no_package_brings_do_not_fail_ci(tmp_path: Path) -> None:
    status, said = _run_of("tests/core/test_lock_containers.py", tmp_path, SMALTI_NO_SKIPS="1")
    assert (status, "1 skipped" in said) == (0, True), said
