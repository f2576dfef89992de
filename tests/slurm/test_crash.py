"""A job whose rank dies comes back by itself; one that gets nowhere fails, and says why. On a real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Slurm, Training, signal_all, weights

pytestmark = pytest.mark.slurm


def _launcher(folder: Path, lines: str) -> str:
    """A launcher that runs lines of bash before the stage, on every rank."""
    (folder / "launcher").write_text(f'cd {shlex.quote(str(folder))} || exit\n{lines}\nexec "$@"\n')
    return f"[bash, {folder}/launcher]"


def test_ranks_that_die_by_a_signal_or_an_error_come_back_and_change_no_bit(
    slurm: Slurm, run_copy: Path, local_run: Path
) -> None:
    launcher = _launcher(
        run_copy.parent, "if [[ $RANK == 1 ]] && rm break 2>/dev/null; then\necho 'OSError: flaky'\nexit 1\nfi"
    )
    more = {"preflight": "never", "launcher": launcher, "supervisor_python": sys.executable}
    training = Training(slurm, run_copy, **more)
    first = training.wait_for_steps(0)
    os.kill(first[1], signal.SIGSEGV)
    signal_all(first, signal.SIGCONT)  # a process that is stopped dies of KILL alone
    ranks = training.wait_for_steps(1)
    (run_copy.parent / "break").touch()
    os.kill(ranks[2], signal.SIGKILL)
    training.wait_until("the error", lambda: training.notes().count("crash") == 3)
    training.wait_for_the_end()
    assert training.state() == "COMPLETED"
    assert training.notes() == [*["started", "crash"] * 3, "started", "finished"]
    ends = [(life["rank"], life["exit_code"], life["error"].split(",")[0]) for life in training.lives()[:3]]
    assert ends == [(1, 139, "killed by SIGSEGV"), (2, 137, "killed by SIGKILL"), (1, 1, "OSError: flaky")]
    assert weights(run_copy, "transformer") == weights(local_run, "transformer")


def test_a_poisoned_step_fails_with_its_line_after_two_lives(slurm: Slurm, run_copy: Path) -> None:
    poison = """mkdir -p tiny/transformer/checkpoints/step-00000050
echo '{"step": 57}' >> tiny/transformer/metrics.jsonl
echo 'ValueError: the sample of step 57 is poisoned'
exit 1"""
    more = {"stages": "{}", "launcher": _launcher(run_copy.parent, poison), "supervisor_python": sys.executable}
    training = Training(slurm, run_copy, 1, **more)
    training.wait_for_the_end()
    assert training.state() == "FAILED"
    assert training.notes() == ["started", "crash"] * 2
    line = "as before at step 57: ValueError: the sample of step 57 is poisoned (the same error in the same place"
    assert line in slurm.smalti("status", str(run_copy))


def test_time_limits_without_progress_fail_a_job_that_says_so(slurm: Slurm, run_copy: Path) -> None:
    default = '{partition: normal, time: "2"}'  # so near that every stop is one for the limit
    more = {"stages": "{}", "launcher": _launcher(run_copy.parent, "exit 0"), "supervisor_python": sys.executable}
    training = Training(slurm, run_copy, 1, default=default, max_time_limits="2", **more)
    training.wait_for_the_end()
    assert training.state() == "FAILED"
    assert training.notes() == ["started", "time limit"] * 3
    line = "time limit, occurrence 3 without progress: the cluster file allows 2 (max_time_limits)"
    assert line in slurm.smalti("status", str(run_copy))


def test_where_requeue_is_refused_a_successor_goes_on_and_dependents_wait_for_it(slurm: Slurm, run_copy: Path) -> None:
    stop = "if [[ ! -e stopped ]]; then\nuntil [[ -e stop ]]; do sleep 0.1; done\ntouch stopped\nexit 0\nfi"
    more = {"stages": "{}", "launcher": _launcher(run_copy.parent, stop), "supervisor_python": sys.executable}
    training = Training(slurm, run_copy, 1, **more)
    waits = ["--parsable", f"--dependency=afterok:{training.id}", "--kill-on-invalid-dep=yes", "-o", "/dev/null"]
    dependent = int(slurm("sbatch", *waits, "--wrap", "true"))
    training.wait_until("the first life", lambda: training.notes() == ["started"])
    slurm("scontrol", "update", f"jobid={training.id}", "requeue=0")
    (run_copy.parent / "stop").touch()
    training.wait_until("the successor", lambda: len(training.notes()) == 3)
    successor = json.loads((run_copy / "slurm" / "jobs.json").read_text())[-1]["id"]
    assert successor != training.id
    assert training.state() == "COMPLETED"
    assert slurm.job(dependent, "Dependency").startswith(f"afterok:{successor}")
    training.wait_until(
        "the dependent's end", lambda: slurm.states()[dependent] not in ("PENDING", "RUNNING", "COMPLETING")
    )
    assert slurm.states()[dependent] == "COMPLETED"
    listed = {entry["stage"]: entry for entry in json.loads(slurm.smalti("status", str(run_copy), "--json"))}
    assert (listed["transformer"]["state"], listed["transformer"]["job"]) == ("FINISHED", str(successor))
    assert listed["transformer"]["restarts"] == 1
