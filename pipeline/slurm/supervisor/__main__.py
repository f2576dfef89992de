"""One life of a job: preflight, ranks, what ended them, what now. Every job file ends with it.

python3 CODE/pipeline/slurm/supervisor RUN --stage transformer --srun "srun --label" --python "apptainer exec … python"
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline.slurm.scheduler import record_job
from pipeline.slurm.supervisor import policy
from pipeline.slurm.supervisor.alone import one_at_a_time
from pipeline.slurm.supervisor.job import ThisJob
from pipeline.slurm.supervisor.policy import Budgets, Decision, Ending, Life, decide, outcome_of
from pipeline.slurm.supervisor.ranks import FirstFailure, Interrupt, first_failure, run_ranks
from pipeline.slurm.supervisor.record import last_step, progress, read_record, record_path, write_record

_MISTAKE, _BAD_HOSTS, _LATE_HOSTS = 2, 3, 5  # exit codes of the preflight
_PREFLIGHT_ENDS = 5  # times its patience after a rank has ended; rank 0 needs three to say who is at fault
_UNTIL_REQUEUED_S = 60.0
_CONTROLLER_PATIENCE_S = 900.0  # that a controller may be away; the hosts of the job do nothing meanwhile
_ASK_CONTROLLER_S = 5.0
# After these Slurm may still be ending a step, by its number.
_LEAVE_STEPS = ("", policy.TAKEN_AWAY, policy.DEAD_HOST, policy.CRASH)
_EMPTY_STEPS_PER_DEAD_LIFE, _DEAD_LIVES_AT_MOST = 3, 8


def main() -> None:
    """Run this life. Never returns."""
    sys.exit(Supervisor(_arguments(sys.argv[1:])).run())


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="supervisor")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--module", required=True, help="of the stage, which the ranks run")
    parser.add_argument("--trains", action="store_true", help="it has checkpoints, whose step is its progress")
    parser.add_argument("--srun", required=True, help="srun and its options, in one word")
    parser.add_argument("--python", required=True, help="what starts Python on a rank, in one word")
    parser.add_argument("--array-tasks", type=int, help="size of the array that this job is a task of")
    parser.add_argument("--stop-ahead-s", type=float, required=True)
    parser.add_argument("--max-time-limits", type=int, required=True, help="all three: without progress")
    parser.add_argument("--max-crashes", type=int, required=True)
    parser.add_argument("--max-bad-hosts", type=int, required=True)
    parser.add_argument("--preflight", help="options of the preflight, in one word; without it there is none")
    return parser.parse_args(words)


class Supervisor:
    """What one life of a job knows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        limits = (options.max_time_limits, options.max_crashes, options.max_bad_hosts)
        self.budgets = Budgets(*limits, of_array=bool(options.array_tasks))
        self.interrupt = Interrupt()
        self.job = ThisJob()
        run, stage, task = options.run, options.stage, self.job.task
        self.what = stage if task is None else f"{stage} task {task}"
        self.directory = run / stage
        self.record_path = record_path(run, stage, task)
        self.first_failure_path = self.record_path.with_suffix(".first-failure")
        self.bad_hosts_path = self.record_path.with_suffix(".bad-hosts")
        self.log = run / "logs" / "slurm" / f"{stage}-{self.job.name}.log"
        self.log_start_byte = self.log.stat().st_size if self.log.exists() else 0
        self.finished_path = self.directory / "_SUCCESS"
        if task is not None:
            self.finished_path = self.directory / "tasks" / f"{task}-of-{options.array_tasks}"
        # What tells this file from the one that an earlier life, perhaps of another config, has left.
        self.success_before = _stamp(self.finished_path)
        self.record = read_record(self.record_path)
        so_far = self._progress()
        self.life = Life(self.job.name, time.time(), self.job.hosts, so_far, so_far)
        self.exit_code: int | None = None  # once it is decided what follows

    def run(self) -> int:
        """The exit code of this life; it may be ended before, by a requeue."""
        before = self.record.chain(self.job.name)
        if before:  # what it saved after its last word counts, too
            before[-1].progress = max(before[-1].progress, self.life.progress_before)
        self.record.failure = ""
        self.record.lives.append(self.life)
        write_record(self.record_path, self.record)
        died = sum(life.outcome in _LEAVE_STEPS for life in before if life.job == self.job.name)
        self.job.use_up_steps(died % _DEAD_LIVES_AT_MOST * _EMPTY_STEPS_PER_DEAD_LIFE)
        os.environ["FIRST_FAILURE"] = str(self.first_failure_path)
        if self.options.preflight is not None:
            code = self._preflight()
            if self.exit_code is None and code and self.job.field("JobState") in ("RUNNING", ""):
                return self._end_of_preflight(code)
        arguments = ["--config", str(self.options.run / "config.yaml")]
        if self.job.task is not None:
            arguments += ["--array-task", f"{self.job.task}/{self.options.array_tasks}"]
        # Ranks whose peer died would hang: --kill-on-bad-exit.
        if self.exit_code is None:
            code = self._run_ranks(["--kill-on-bad-exit=1", "--wait=60"], self.options.module, arguments)
        if self.exit_code is not None:
            return self.exit_code
        first = self._first_failure(code)
        return self._end(self._ending(first), first)

    def _preflight(self) -> int:
        self.bad_hosts_path.unlink(missing_ok=True)
        arguments = [str(self.options.run), "--stage", self.options.stage, "--hosts", ",".join(self.job.hosts)]
        arguments += ["--bad-hosts", str(self.bad_hosts_path), *shlex.split(self.options.preflight)]
        # A rank that dies must not end rank 0, which says so; one that is stopped must not keep the job.
        limit = argparse.ArgumentParser()
        limit.add_argument("--timeout-s", type=float, default=120)
        wait_s = _PREFLIGHT_ENDS * limit.parse_known_args(shlex.split(self.options.preflight))[0].timeout_s
        return self._run_ranks(["--kill-on-bad-exit=0", f"--wait={wait_s:.0f}"], "pipeline.cli.preflight", arguments)

    def _end_of_preflight(self, code: int) -> int:
        first = self._first_failure(code)
        bad = sorted(set(self.bad_hosts_path.read_text().split())) if self.bad_hosts_path.exists() else []
        if bad:
            self.life.outcome, self.life.blamed = policy.BAD_HOST, bad
            return self._follow(code, first)
        # Which rank srun tells of is chance: one says who is late, the others that they waited in vain.
        known = {_LATE_HOSTS: policy.LATE_HOST, _MISTAKE: policy.MISTAKE}
        self.life.outcome = known.get(first.code, known.get(code, policy.CRASH))
        return self._follow(code, first)

    def _run_ranks(self, srun_flags: list[str], module: str, arguments: list[str]) -> int:
        self.first_failure_path.unlink(missing_ok=True)
        srun = [*shlex.split(self.options.srun), *srun_flags]
        return run_ranks(
            [*shlex.split(self.options.python), "-m", module, *arguments], srun, self.interrupt, self._on_term
        )

    def _on_term(self) -> None:
        """Slurm ends this job. The ranks have KillWait seconds to save, and then this process is killed, too: at the
        time limit it is up to this process to bring the job back, and at once."""
        if self.job.at_time_limit():
            self.exit_code = self._end(Ending(finished=False, code=0, at_time_limit=True), FirstFailure())

    def _ending(self, first: FirstFailure) -> Ending:
        # An old one counts if the stage itself has found it up to date: then it has touched it. Exit 0 is not enough, a
        # stage that is asked to stop while it waits for a lock ends so, too.
        finished = _stamp(self.finished_path) not in (None, self.success_before)
        state = self.job.field("JobState") or "RUNNING"
        running, code = state == "RUNNING" and not finished, first.code
        return Ending(
            finished=finished,
            code=code,
            job_state=state,
            at_time_limit=not running and not finished and self.job.at_time_limit(),
            near_time_limit=running and code == 0 and self.job.near_time_limit(self.options.stop_ahead_s),
            preempted=running and code == 0 and self.job.preempted(),
            dead_hosts=self.job.dead_hosts() if running and code else (),
            said="\n".join(first.lines) if code else "",
            error=first.error if code else "",
        )

    def _end(self, ending: Ending, first: FirstFailure) -> int:
        self.life.outcome = outcome_of(ending)
        if self.life.outcome == policy.DEAD_HOST:
            self.life.blamed = list(ending.dead_hosts)
        return self._follow(ending.code, first)

    def _follow(self, code: int, first: FirstFailure) -> int:
        """Note how this life ended, and do what the policy says."""
        life = self.life
        life.ended, life.exit_code, life.progress = time.time(), first.code or code, self._progress()
        if life.outcome in (policy.CRASH, policy.MISTAKE, policy.LOCKED):
            life.error, life.rank, life.step = first.error, first.rank, last_step(self.directory)
            life.blamed, life.of_hardware = [first.host] if first.host else [], bool(first.of_hardware)
        spare = self.job.spare_hosts() if life.outcome in (policy.CRASH, policy.BAD_HOST) else None
        decision = decide(self.record.chain(self.job.name), self.budgets, spare)
        write_record(self.record_path, self.record)
        if decision.action == "fail":
            return self._fail(decision, first.lines if code else ())
        if decision.action == "again":
            return self._again(decision)
        return decision.exit_code

    def _fail(self, decision: Decision, lines: Sequence[str]) -> int:
        """Report it in the log and in `smalti status`; dependent jobs end."""
        text = f"smalti: {self.what} {decision.line}"
        if not decision.line.startswith("failed"):
            text = f"smalti: {self.what}: {decision.line}"
        if lines:
            text += "; its last lines:\n" + "\n".join(lines)
        print(text, file=sys.stderr, flush=True)
        self.record.failure = text
        write_record(self.record_path, self.record)
        return decision.exit_code or 1

    def _again(self, decision: Decision) -> int:
        print(f"smalti: {decision.line}: {self.what} resumes when this job starts again", flush=True)
        self.interrupt.received = False
        if self._with_patience(lambda: self.job.requeue(decision.exclude)):
            self.interrupt.wait(_UNTIL_REQUEUED_S)  # who stays beyond it is killed after KillWait, half a minute lost
            return 75
        if self.interrupt.received and self.job.field("JobState") == "CANCELLED":
            return 75
        script = f"{self.options.stage}{'' if self.job.task is None else '.tasks'}"
        successor = self.job.submit_successor(self.options.run / "slurm" / f"{script}.sbatch", decision.exclude)
        if successor is None:
            why = f"Slurm refused to requeue job {self.job.name}, and another one"
            if not self.job.controller_answers():
                why = f"Slurm's controller does not answer, so job {self.job.name} could not be requeued"
            line = f"{why}: smalti resubmit {self.options.run}"
            return self._fail(Decision("fail", line, exit_code=75), ())
        self.record.jobs[successor] = self.record.jobs.get(self.job.name, self.job.name)
        write_record(self.record_path, self.record)
        number = successor.split("_")[0]
        with self._succession():
            record_job(self.options.run, script, int(number))
        if not self._with_patience(lambda: self._moved_dependents(number)):
            # They must not start: this job has not made what they wait for.
            line = f"job {successor} resumes, but what waits for this job could not all be moved to that one, and ends"
            print(f"smalti: {line}: then smalti resubmit {self.options.run}", file=sys.stderr, flush=True)
            return 75
        line = f"requeue is not allowed here: job {successor} resumes, and what waited waits for it"
        print(f"smalti: {line}", flush=True)
        return 0

    def _succession(self) -> AbstractContextManager[None]:
        """All tasks of an array have one time limit."""
        return one_at_a_time(self.options.run / "slurm" / ".succession")

    def _moved_dependents(self, successor: str) -> bool:
        with self._succession():
            return self.job.move_dependents(successor)

    def _with_patience(self, done: Callable[[], bool]) -> bool:
        """Whether it is done; tried again for some minutes while no controller answers, unless Slurm ends this job."""
        deadline = time.monotonic() + _CONTROLLER_PATIENCE_S
        while True:
            answered = self.job.controller_answers()  # before, for it may be back just after
            if done():
                return True
            if answered or self.interrupt.received or time.monotonic() > deadline:
                return False
            self.interrupt.wait(_ASK_CONTROLLER_S)

    def _first_failure(self, code: int) -> FirstFailure:
        return first_failure(self.first_failure_path, self.log, self.log_start_byte, code)

    def _progress(self) -> int:
        task = None if self.job.task is None else (self.job.task, self.options.array_tasks)
        return progress(self.directory, self.options.trains, task)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


if __name__ == "__main__":
    main()
