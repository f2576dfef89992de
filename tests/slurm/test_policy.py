"""What follows the lives of a job, by the supervisor's pure policy: recorded lives in, a decision out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from pipeline.core import lock
from pipeline.slurm.supervisor import job, policy
from pipeline.slurm.supervisor.alone import one_at_a_time
from pipeline.slurm.supervisor.job import moved_dependency
from pipeline.slurm.supervisor.policy import Budgets, Decision, Ending, Life, decide, outcome_of
from pipeline.slurm.supervisor.ranks import first_failure
from pipeline.slurm.supervisor.record import Record, last_step, progress, read_record, write_record
from tests.launch import ROOT

BUDGETS = Budgets(max_time_limits=3, max_crashes=3, max_bad_hosts=3)


def _life(outcome: str, before: int = 0, after: int = 0, host: str = "", error: str = "", step: int = 0) -> Life:
    return Life(
        *("12", 0.0, ["node1", "node2"], before, after, 1.0, outcome, 1),
        blamed=[host] if host else [],
        rank=2,
        step=step,
        error=error,
    )


def _decisions(lives: list[Life], spare_hosts: int | None = None) -> list[Decision]:
    """What was decided after each of the lives, to the first that is not to be followed by another."""
    decided = []
    for count in range(1, len(lives) + 1):
        decided.append(decide(lives[:count], BUDGETS, spare_hosts))
        if decided[-1].action != "again":
            break
    return decided


@pytest.mark.parametrize("outcome", [policy.TIME_LIMIT, policy.CRASH, policy.BAD_HOST, policy.DEAD_HOST])
def test_thirty_lives_with_progress_never_fail_a_job(outcome: str) -> None:
    lives = [_life(outcome, 10 * n, 10 * n + 10, error="OSError: x", step=10 * n + 15) for n in range(30)]
    assert [decided.action for decided in _decisions(lives)] == ["again"] * 30


@pytest.mark.parametrize(
    ("outcome", "budget"),
    [
        (policy.TIME_LIMIT, "max_time_limits"),
        (policy.CRASH, "max_crashes"),
        (policy.LOCKED, "max_crashes"),
        (policy.BAD_HOST, "max_bad_hosts"),
        (policy.LATE_HOST, "max_bad_hosts"),
        (policy.DEAD_HOST, "max_bad_hosts"),
    ],
)
def test_the_fourth_life_without_progress_fails_a_job_and_says_so(outcome: str, budget: str) -> None:
    lives = [_life(outcome, 10, 10, error=f"OSError: {n}", step=n) for n in range(9)]
    decided = _decisions(lives)
    assert [one.action for one in decided] == ["again"] * 3 + ["fail"]
    assert decided[-1].line.endswith(f"occurrence 4 without progress: the cluster file allows 3 ({budget})")


def test_a_life_with_progress_gives_every_budget_back() -> None:
    stuck = [_life(policy.TIME_LIMIT, 10, 10)] * 3
    assert decide([*stuck, _life(policy.PREEMPTED, 10, 20), *stuck], BUDGETS).action == "again"
    assert decide([*stuck, _life(policy.PREEMPTED, 10, 10), *stuck], BUDGETS).action == "fail"


def test_other_ends_between_them_do_not_hide_time_limits_without_progress() -> None:
    lives = [_life(what, 10, 10) for what in (policy.TIME_LIMIT, policy.PREEMPTED, "", policy.ASKED_TO_STOP) * 4]
    assert [one.action for one in _decisions([life for life in lives if life.outcome])][-1] == "fail"


def test_preemptions_and_requests_to_stop_spend_no_budget() -> None:
    for outcome in (policy.PREEMPTED, policy.ASKED_TO_STOP):
        assert decide([_life(outcome, 10, 10)] * 900, BUDGETS).action == "again"


def test_the_same_error_at_the_same_step_twice_is_a_bug_and_fails_with_its_line() -> None:
    lives = [
        _life(policy.CRASH, 0, 50, "node1", "ValueError: loss of pid 71234 at 0x7f00 is wrong", step=57),
        _life(policy.CRASH, 50, 50, "node2", "ValueError: loss of pid 91111 at 0x8a10 is wrong", step=57),
    ]
    decided = _decisions(lives)
    assert [one.action for one in decided] == ["again", "fail"]
    assert decided[-1].line.startswith(
        "failed: rank 2 on node2 failed first (exit 1), as before at step 57: ValueError"
    )


def test_the_same_error_at_the_same_step_is_a_bug_though_a_checkpoint_came_between() -> None:
    lives = [
        _life(policy.CRASH, 0, 50, error="ValueError: x", step=57),
        _life(policy.CRASH, 50, 55, error="ValueError: x", step=57),
    ]
    assert [one.action for one in _decisions(lives)] == ["again", "fail"]


def test_a_task_of_an_array_fails_for_a_bug_at_one_of_its_pieces_and_not_at_two() -> None:
    lives = [_life(policy.CRASH, 3, 3, error="ValueError: x"), _life(policy.CRASH, 3, 4, error="ValueError: x")]
    for life in lives:
        life.step = None
    assert decide(lives, BUDGETS).action == "again"
    assert decide([*lives, replace(lives[-1], progress_before=4)], BUDGETS).action == "fail"


@pytest.mark.parametrize(
    "error",
    [
        "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled system error",
        "torch.distributed.DistNetworkError: The server socket has failed to bind: Address already in use",
        "OSError: [Errno 108] Cannot send after transport endpoint shutdown",
    ],
)
def test_an_error_of_a_link_or_a_file_system_is_no_bug(error: str) -> None:
    assert policy.OF_HARDWARE.search(error)
    lives = [replace(_life(policy.CRASH, 50, 50, error=error, step=57), of_hardware=True)] * 4
    assert [one.action for one in _decisions(lives)] == ["again"] * 3 + ["fail"]


def test_a_step_that_slurm_killed_whole_is_no_bug_of_ours() -> None:
    life = _life(policy.CRASH, 50, 50, error="killed by SIGKILL", step=57)
    life.rank = None
    decided = _decisions([life] * 4)
    assert [one.action for one in decided] == ["again"] * 3 + ["fail"]
    assert decided[-1].line.startswith("failed: the whole step was killed (exit 1), occurrence 4 without progress")


@pytest.mark.parametrize(
    ("error", "step"),
    [
        ("ValueError: the loss is wrong", 58),  # elsewhere
        ("ValueError: the norm is wrong", 57),  # another one
    ],
)
def test_another_error_or_another_step_is_tried_again(error: str, step: int) -> None:
    first = _life(policy.CRASH, 0, 50, "node1", "ValueError: the loss is wrong", step=57)
    assert decide([first, _life(policy.CRASH, 50, 50, "node2", error, step)], BUDGETS).action == "again"


def test_an_error_of_the_hardware_is_no_bug_and_its_host_is_left_out_after_the_second() -> None:
    error = "torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered"
    lives = [replace(_life(policy.CRASH, 50, 50, "node1", error, step=57), of_hardware=True)] * 2
    assert [one.exclude for one in _decisions(lives, spare_hosts=3)] == [(), ("node1",)]
    decided = _decisions(lives, spare_hosts=0)[-1]
    assert decided.exclude == ()  # the job would wait for ever
    assert decided.action == "again"
    assert "too few other hosts are up" in decided.line


def test_first_deaths_on_two_hosts_leave_none_out() -> None:
    lives = [_life(policy.CRASH, 50, 50, host, host, step=n) for n, host in enumerate(("node1", "node2"))]
    assert [one.exclude for one in _decisions(lives, 3)] == [(), ()]


def test_a_bad_host_is_left_out_at_once_and_a_late_one_never() -> None:
    assert decide([_life(policy.BAD_HOST, host="node1")], BUDGETS, 1).exclude == ("node1",)
    assert decide([_life(policy.LATE_HOST, host="node1")] * 3, BUDGETS, 1) == Decision("again", "late host (node1)")


def test_a_users_mistake_is_never_tried_again_and_a_held_lock_is() -> None:
    assert outcome_of(Ending(False, 2, said="0: error: expected a folder")) == policy.MISTAKE
    refusal = str(lock._refusal("stage x", lock._this_process("t"), Path("/nowhere")))
    assert outcome_of(Ending(False, 2, said=f"0: error: {refusal}")) == policy.LOCKED
    assert decide([_life(policy.MISTAKE, error="error: expected a folder")], BUDGETS).action == "fail"


def test_a_held_lock_never_fails_a_task_of_an_array() -> None:
    budgets = Budgets(max_crashes=0, of_array=True)
    assert decide([_life(policy.LOCKED) for _ in range(100)], budgets).action == "again"
    line = decide([_life(policy.CRASH) for _ in range(2)], replace(budgets, max_crashes=1)).line
    assert "max_task_retries" in line


@pytest.mark.parametrize(
    ("ending", "outcome"),
    [
        (Ending(True, 0), policy.FINISHED),
        (Ending(True, 1), policy.FINISHED),
        (Ending(False, 0), policy.ASKED_TO_STOP),
        (Ending(False, 0, near_time_limit=True), policy.TIME_LIMIT),
        (Ending(False, 0, near_time_limit=True, preempted=True), policy.PREEMPTED),
        (Ending(False, 137, "TIMEOUT", at_time_limit=True), policy.TIME_LIMIT),
        (Ending(False, 137, "PREEMPTED"), policy.TAKEN_AWAY),
        (Ending(False, 0, "CANCELLED"), policy.TAKEN_AWAY),
        (Ending(False, 137, dead_hosts=("node1",)), policy.DEAD_HOST),
        (Ending(False, 137), policy.CRASH),
    ],
)
def test_what_ended_a_life_is_told_apart(ending: Ending, outcome: str) -> None:
    assert outcome_of(ending) == outcome


def test_a_successor_inherits_the_lives_and_a_new_submission_does_not(tmp_path: Path) -> None:
    record = Record([_life(policy.TIME_LIMIT)], {"15": "12", "18": "12"})
    path = tmp_path / "x.lives.json"
    write_record(path, record)
    assert read_record(path) == record
    assert len(read_record(path).chain("18")) == 1
    assert read_record(path).chain("20") == []
    path.write_text('{"lives": [')
    assert read_record(path) == Record()


@pytest.mark.parametrize(
    ("known", "array", "moved"),
    [
        ("afterok:12(unfulfilled)", None, "afterok:15"),
        ("afterok:11(unfulfilled),afterok:12(unfulfilled)", None, "afterok:11:15"),
        ("singleton(unfulfilled),afterok:12(unfulfilled)", None, "singleton,afterok:15"),
        ("afterok:112(unfulfilled)", None, "afterok:112(unfulfilled)"),
        ("afterany:12(unfulfilled)", None, "afterany:12(unfulfilled)"),
        ("(null)", None, "(null)"),
        ("afterok:12?afterok:13", None, "afterok:12?afterok:13"),
        ("afterok:9_*(unfulfilled):12_*(unfulfilled)", "theirs", "afterok:9:12:15"),
        ("afterany:12_*(unfulfilled)", "theirs", "afterany:12_*(unfulfilled)"),
        # The join: a task that was killed at its limit must not end it, and does its work in the successor.
        ("afterok:12_*(unfulfilled)", "ours", "afterok:15,afterany:12"),
        ("afterok:14_*(unfulfilled),afterany:12_*(unfulfilled)", "ours", "afterok:14:15,afterany:12"),
    ],
)
def test_what_waited_for_a_job_waits_for_its_successor(
    known: str, array: Literal["ours", "theirs"] | None, moved: str
) -> None:
    assert moved_dependency(known, "12", "15", array) == moved


TASK = """
import sys
from pathlib import Path
from pipeline.slurm.supervisor.alone import one_at_a_time
from pipeline.slurm.supervisor.job import ThisJob
job = ThisJob.__new__(ThisJob)
job.name, job.task = f"12_{sys.argv[1]}", int(sys.argv[1])
with one_at_a_time(Path(sys.argv[2]) / ".succession"):
    job.move_dependents(f"2{sys.argv[1]}")
"""


@pytest.mark.slow
def test_of_tasks_that_all_reach_their_time_limit_at_once_no_successor_is_forgotten(tmp_path: Path) -> None:
    join = tmp_path / "join"
    join.write_text("afterok:12_*(unfulfilled)\n")
    tell = f'read -r dependency <{join}\nsleep 0.1\necho "30|$dependency|smalti:tokenize:/runs/x"'
    for name, lines in (("squeue", tell), ("scontrol", f'echo "${{3#dependency=}}" >{join}')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    tasks = [subprocess.Popen([sys.executable, "-c", TASK, str(task), str(tmp_path)], env=paths) for task in range(6)]
    assert [task.wait(60) for task in tasks] == [0] * 6
    successors, array = join.read_text().strip().split(",")
    assert sorted(successors.removeprefix("afterok:").split(":")) == [f"2{task}" for task in range(6)]
    assert array == "afterany:12"


def test_who_was_killed_in_the_middle_of_a_succession_holds_up_no_other_for_long(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with one_at_a_time(tmp_path / "x", stale_after_s=0.3):
        assert (tmp_path / "x").exists()
    assert not (tmp_path / "x").exists()


def test_progress_is_the_newest_checkpoint_or_the_number_of_files(tmp_path: Path) -> None:
    assert progress(tmp_path / "none", trains=True) == progress(tmp_path / "none", trains=False) == 0
    for name in ("step-00000050", "step-00000100", "step-00000150.tmp", "step-00000120.damaged"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("a.tar", ".b.tar.123.tmp"):
        (tmp_path / name).touch()
    assert progress(tmp_path, trains=True) == 100
    assert progress(tmp_path, trains=False) == 1
    assert progress(tmp_path, False, (3, 64)) == 0
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "3-of-64.pieces").write_text("17")
    assert progress(tmp_path, False, (3, 64)) == 17
    (tmp_path / "metrics.jsonl").write_text('{"step": 57, "loss": 1.0}\n{"step": 58, "lo')
    assert last_step(tmp_path) == 57


@pytest.mark.parametrize(
    ("code", "lines", "error"),
    [
        (1, ["Traceback (most recent call last):", '  File "x.py"', "ValueError: bad"], "ValueError: bad"),
        (137, ["step 5"], "killed by SIGKILL"),
        (139, ["RuntimeError: x"], "killed by SIGSEGV, after: RuntimeError: x"),
        (1, ["something", ""], "something"),
    ],
)  # fmt: skip
def test_the_line_that_says_why_is_found(code: int, lines: list[str], error: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        "3: of the life before\n" + "".join(f"03: {line}\n" for line in lines) + "13: other\n"
    )
    (tmp_path / "first").write_text(f"3 node1 {code}\n")
    found = first_failure(tmp_path / "first", tmp_path / "log", len("3: of the life before\n"), code=9)
    assert (found.rank, found.host, found.code, found.error) == (3, "node1", code, error)


@pytest.mark.parametrize(
    ("srun", "sinfo", "dead"),
    [
        ("echo node1; exec sleep 60", "exit 1", ("node2",)),  # it hangs at the dead one
        ("echo node1; echo node2", "exit 1", ()),
        ("exit 1", "echo node1 allocated; echo node2 'down*'; echo node2 'down*'", ("node2",)),
        ("exit 1", "echo node1 allocated; echo node2 'allocated*'", ("node2",)),
        ("exit 1", "echo node1 allocated; echo node2 idle", ()),  # nothing says that one is dead
    ],
)
def test_a_host_is_dead_if_it_alone_does_not_answer(
    srun: str, sinfo: str, dead: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, lines in (("srun", srun), ("sinfo", sinfo)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(job, "_ANSWER_S", 0.5)
    this = job.ThisJob.__new__(job.ThisJob)
    this.hosts = ["node1", "node2"]
    assert this.dead_hosts() == dead
