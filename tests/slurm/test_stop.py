"""Whatever ends a job, the run resumes by itself and ends with the same weights; only a crash ends it, and says so."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.launch import launch
from tests.slurm.conftest import Slurm, Training, cluster_file, signal_all, wait_until, weights

pytestmark = pytest.mark.slurm
# What needs no four ranks is quicker with two, and what needs no preflight without one: it has tests of its own.
TWO_NODES = {"stages": "{transformer: {nodes: 2}}", "preflight": "never"}
USR2_BIT = 1 << (signal.SIGUSR2 - 1)


def _run_into_the_time_limit(training: Training, ranks: list[int]) -> None:
    """Slurm looks every 30 s who is near a limit. The ranks sleep until its signal is there, however fast they are."""
    training.slurm("scontrol", "update", f"jobid={training.id}", "EndTime=now+1minute")
    wait_until("USR2", lambda: all(map(_has_been_signalled, ranks)))
    signal_all(ranks, signal.SIGCONT)
    wait_until("the requeue", lambda: training.state() == "PENDING")
    training.slurm("scontrol", "update", f"jobid={training.id}", "TimeLimit=30")


def _be_killed_by_the_time_limit(training: Training, ranks: list[int]) -> None:
    """The ranks sleep through the signal ahead of it and through TERM, for which Slurm wakes them, until KILL."""
    training.slurm("scontrol", "update", f"jobid={training.id}", "EndTime=now+1")
    wait_until("the requeue", lambda: (signal_all(ranks, signal.SIGSTOP), training.state() == "PENDING")[1], share=1)
    training.slurm("scontrol", "update", f"jobid={training.id}", "TimeLimit=30")


def _has_been_signalled(process: int) -> bool:
    """Of a process that slept: USR2 waits for it, or Slurm has woken it (some versions send CONT first)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    values = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return not values["State"].startswith("T") or bool(int(values["ShdPnd"], 16) & USR2_BIT)


def test_three_time_limits_a_preemption_and_a_dead_node_change_no_bit(
    slurm: Slurm, run_copy: Path, local_run: Path
) -> None:
    training = Training(slurm, run_copy, partition="preempt", preflight="never")
    ranks = training.wait_for_steps(0)
    # As good a moment as any: nobody else may write here. Rank 0 waits for the others, and its lock beats meanwhile.
    signal_all(ranks[:1], signal.SIGCONT)
    refused = slurm.smalti("--config", str(run_copy / "config.yaml"), module="stages.transformer", check=False)
    signal_all(ranks[:1], signal.SIGSTOP)
    assert "stage transformer is already being written by process" in refused
    assert f"(Slurm job {training.id})" in refused
    _run_into_the_time_limit(training, ranks)

    _be_killed_by_the_time_limit(training, training.wait_for_steps(1))
    assert training.log().count("stopped at step") == 1

    _run_into_the_time_limit(training, training.wait_for_steps(2))

    signal_all(training.wait_for_steps(3), signal.SIGCONT)
    slurm("sbatch", "--wait", "-p", "normal", "-w", "node1", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")

    signal_all(training.wait_for_steps(4), signal.SIGCONT)
    slurm.testbed("crash", "node2")
    wait_until("the loss noticed", lambda: training.state() == "PENDING")
    slurm.testbed("boot", "node2")

    training.wait_for_the_end()
    assert training.state() == "COMPLETED"
    notes = training.notes()
    assert notes.count("time limit") == 3
    assert notes.count("started") == 6
    assert weights(run_copy, "transformer") == weights(local_run, "transformer")
    log = training.log()
    assert log.count("transformer: resuming from step ") == 5
    assert re.search(r"transformer: stopped at step \d+/100: SIGUSR2 at [\d:]+ on node1 \(rank 0", log)
    # Slurm asks a dead node again and again to end its step, by number: the step after the restart has another.
    launched = re.findall(rf"launch task StepId={training.id}\.(\d+) ", (slurm.folder / "log/node1.log").read_text())
    assert launched.count(launched[-1]) == 1


def test_a_user_signal_a_requeue_by_hand_and_a_controller_that_restarts_lose_nothing_and_cancel_ends_it(
    slurm: Slurm, run_copy: Path
) -> None:
    training = Training(slurm, run_copy, 2, **TWO_NODES)
    theirs = int(slurm("sbatch", "--parsable", "-o", "/dev/null", "--wrap", "sleep 300"))
    ranks = training.wait_for_steps(0)
    follower = slurm.follow("logs", str(run_copy), "transformer", "--follow", "-n", "0")
    slurm.testbed("crash", "slurmctld")
    before = training.step()
    signal_all(ranks, signal.SIGCONT)
    training.wait_until("a step without a controller", lambda: training.step() > before)
    signal_all(ranks, signal.SIGSTOP)
    slurm.testbed("boot", "slurmctld")
    assert training.notes() == ["started"]
    assert training.state() == "RUNNING"
    signal_all(ranks, signal.SIGCONT)
    slurm("scancel", "--signal=USR2", str(training.id))
    signal_all(training.wait_for_steps(1), signal.SIGCONT)
    slurm("scontrol", "requeue", str(training.id))
    training.wait_until("restart 2", lambda: training.notes().count("started") == 3)
    assert training.notes().count("asked to stop") == 1
    assert f"cancelled: {training.id}" in slurm.smalti("cancel", str(run_copy))
    again = slurm.smalti("resubmit", str(run_copy), "--only", "transformer")  # at once, while that job is still ending
    assert "submitted: slurm/transformer.sbatch" in again
    wait_until("the first one cancelled", lambda: training.state() == "CANCELLED")
    assert "cancelled: " in slurm.smalti("cancel", str(run_copy))
    wait_until("all ours ended", lambda: training.slurm("squeue", "-h", "-o", "%A").split() == [str(theirs)])
    assert slurm.states()[theirs] in ("PENDING", "RUNNING")
    assert "is queued or running" in slurm.smalti("cancel", str(run_copy))
    slurm("scancel", str(theirs))
    follower.send_signal(signal.SIGINT)
    followed, _ = follower.communicate(timeout=30)
    assert follower.returncode == 0
    assert "smalti: asked to stop: transformer resumes when this job starts again" in followed
    assert "transformer: resuming from step" in followed


def test_a_preemption_with_grace_and_a_time_limit_with_progress_spend_no_budget(slurm: Slurm, run_copy: Path) -> None:
    slurm("scontrol", "update", "partition=preempt", "GraceTime=60")
    training = Training(slurm, run_copy, 1, partition="preempt", stages="{}", max_time_limits="0")
    ranks = training.wait_for_steps(0)
    # So near that what stops the job may be taken for the limit, and not so near that Slurm signals it for that.
    slurm("scontrol", "update", f"jobid={training.id}", "EndTime=now+140")
    slurm("sbatch", "-p", "normal", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
    wait_until("USR2", lambda: all(map(_has_been_signalled, ranks)))
    signal_all(ranks, signal.SIGCONT)
    training.wait_until("another start", lambda: training.notes().count("started") > 1)
    slurm("scontrol", "update", f"jobid={training.id}", "TimeLimit=30")
    slurm("scontrol", "update", "partition=preempt", "GraceTime=0")

    _run_into_the_time_limit(training, training.wait_for_steps(1))
    training.wait_until("a third one", lambda: training.notes().count("started") > 2)
    assert training.notes() == ["started", "preempted", "started", "time limit", "started"]
    slurm.smalti("cancel", str(run_copy))


def test_a_crash_ends_its_dependents_and_status_says_which_rank_said_what(slurm: Slurm, run_copy: Path) -> None:
    late = ["transformer.training.checkpoint_every=100"]  # a life with a checkpoint has got on, and may crash
    training = Training(slurm, run_copy, only=False, changes=late, max_crashes="0", preflight="never")
    ranks = training.wait_for_steps(0)
    watcher = slurm.follow("status", str(run_copy), "--watch")
    assert watcher.stdout
    assert any("RUNNING" in line for line in watcher.stdout), "it ended before it saw the job running"
    os.kill(ranks[2], signal.SIGKILL)
    signal_all([rank for rank in ranks if rank != ranks[2]], signal.SIGCONT)
    training.wait_for_the_end()
    assert training.state() == "FAILED"
    wait_until("no dependent pending", lambda: not slurm("squeue", "-h", "--me").strip())
    states = {script: slurm.states()[job] for script, job in training.jobs.items()}
    assert states == {**dict.fromkeys(states, "CANCELLED"), "transformer": "FAILED"}
    table = slurm.smalti("status", str(run_copy))
    assert "transformer failed: rank 2 on node2 failed first (exit 137); its last lines:" in table
    assert "Killed" in table
    watched, _ = watcher.communicate(timeout=30)  # it ends by itself when all is at rest
    assert table.splitlines()[-1] in watched
    (run_copy.parent / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n"
    )
    alone = launch("pipeline", "status", str(run_copy), SLURM_CONF=str(run_copy.parent / "slurm.conf"))
    assert "without Slurm's answer: " in alone
    assert re.search(r"^generate +UNKNOWN .*Slurm gives no answer$", alone, re.MULTILINE)
    assert "transformer failed: rank 2 on node2 failed first (exit 137)" in alone

    # Once fixed it resumes: what failed, and what depended on it.
    again = slurm.smalti("resubmit", str(run_copy))
    assert [line.split()[0] for line in again.splitlines() if "submitted" in line] == [
        *("transformer", "generate", "generate", "evaluate", "report")
    ]
    slurm.smalti("cancel", str(run_copy))
    wait_until("an empty queue", lambda: not slurm("squeue", "-h", "--me").strip())


def test_a_users_mistake_is_told_once_and_leaves_nothing_pending(slurm: Slurm, tmp_path: Path) -> None:
    source = "prepare.source={kind: folder, path: /nowhere/at/all}"
    cluster = str(cluster_file(tmp_path))
    slurm.smalti("submit", str(TINY), f"runs={tmp_path}", source, "--cluster", cluster)
    wait_until("an empty queue", lambda: not slurm("squeue", "-h", "--me").strip())
    listed = {entry["stage"]: entry for entry in json.loads(slurm.smalti("status", str(tmp_path / "tiny"), "--json"))}
    assert listed["prepare"]["state"] == "FAILED"
    assert "error: " in listed["prepare"]["failure"]
    assert "/nowhere/at/all" in listed["prepare"]["failure"]
    assert {entry["state"] for stage, entry in listed.items() if stage != "prepare"} == {"CANCELLED"}


def test_a_host_that_cannot_read_the_inputs_is_named_and_left(slurm: Slurm, run_copy: Path) -> None:
    user = "" if os.getuid() == 0 else "--user --map-current-user --keep-caps"
    hidden = f"""bash -c 'mount -t tmpfs none "{run_copy}/tokenize" && exec "$@"'"""
    launcher = _on_node1(run_copy.parent, f'exec unshare {user} --mount {hidden} bash "$@"')
    training = Training(slurm, run_copy, 2, stages="{transformer: {nodes: 1, gpus: 2}}", launcher=launcher)
    _assert_node1_left(training, "cannot read a finished tokenize")


def test_a_host_whose_clock_is_wrong_is_named_and_left(slurm: Slurm, run_copy: Path) -> None:
    """Locks and time limits rest on clocks. The processes on node1 get another time of day from libc."""
    if not (library := next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)):
        pytest.skip("no libfaketime; `slurm/testbed install` installs it (as root)")
    wrong = f"export LD_PRELOAD={library} FAKETIME=+60s NO_FAKE_STAT=1 DONT_FAKE_MONOTONIC=1"
    launcher = _on_node1(run_copy.parent, wrong)
    setup = '["export FROM_SETUP=1", "test $FROM_SETUP = 1 || exit 9"]'
    training = Training(slurm, run_copy, 1, stages="{}", preflight="always", launcher=launcher, setup=setup)
    _assert_node1_left(training, "its clock is +60 s off the file system's")


def _on_node1(folder: Path, line: str) -> str:
    """A launcher that runs a line of bash before what it starts, but only on node1."""
    (folder / "launcher").write_text(f'if [[ $(hostname) == node1 ]]; then\n{line}\nfi\nexec "$@"\n')
    return f"[bash, {folder}/launcher]"


def _assert_node1_left(training: Training, why: str) -> None:
    training.wait_until("work on the other node", training.ranks)
    assert training.slurm.job(training.id, "NodeList") == "node2"
    assert training.slurm.job(training.id, "ExcNodeList") == "node1"
    assert f"preflight: bad host node1: {why}" in training.log()
    training.slurm.smalti("cancel", str(training.run))
