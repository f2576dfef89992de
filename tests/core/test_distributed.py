"""Processes meet on loopback when all are here, say in one line when they do not, and each error is told once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.core import rendezvous
from pipeline.core.errors import UserError
from pipeline.core.loopback import free_port
from tests.launch import environment


def together(*arguments: str, processes: int = 2, started: int = 2, **extra: str) -> list[tuple[int, str]]:
    """Exit code and output of each process."""
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "no.such.host.invalid"}
    common |= {"MASTER_PORT": str(free_port())} | extra
    command = [sys.executable, "-m", "tests.core.distributed_worker", *arguments]
    children = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(started)
    ]
    outputs = [child.communicate(timeout=60)[0] for child in children]
    return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


@pytest.mark.slow  # two processes that import torch
def test_local_processes_listen_on_loopback_alone_and_need_no_host_name() -> None:
    for code, output in together("listen"):
        assert code == 0, output
        assert "sum 2.0" in output
        listening = {line.split()[1] for line in output.splitlines() if line.startswith("LISTEN")}
        assert listening <= {"127.0.0.1", "::1"}, output


@pytest.mark.slow
@pytest.mark.parametrize("local", [True, False])
def test_processes_that_do_not_meet_say_so_within_the_time_limit(local: bool) -> None:
    extra = {} if local else {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    [(code, output)] = together("wait", started=1, **extra)
    assert code == 2
    assert output.count("error: expected the 2 processes to meet at 127.0.0.1:") == 1
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "told"),
    [(("", "shard 7 is damaged"), 1), (("the same", "the same"), 1), (("this", "that"), 2), (("mine alone", ""), 1)],
)
def test_an_error_of_any_process_is_told_once(said: tuple[str, str], told: int) -> None:
    outputs = "".join(output for _, output in together("fail", *said))
    assert outputs.count("error: ") == told, outputs
    assert all(f"error: {text}" in outputs for text in said if text)


def test_a_rank_that_is_left_in_the_environment_is_ignored_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    left_over = {"RANK": "0", "HOME": "/"}
    assert rendezvous.launched(left_over) is None
    assert left_over == {"HOME": "/"}
    assert "RANK is set and WORLD_SIZE and MASTER_ADDR and MASTER_PORT not" in caplog.text


def test_what_mpi_says_is_not_taken_for_a_launcher() -> None:
    left_over = {"OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "1"}
    assert rendezvous.launched(left_over) is None
    assert not left_over


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": "2"}, {"MASTER_PORT": "0"}, {"WORLD_SIZE": "-1"}])
def test_a_launchers_variables_that_are_no_numbers_are_one_line(wrong: dict[str, str]) -> None:
    good = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "80"}
    with pytest.raises(UserError, match="expected"):
        rendezvous.launched(good | wrong)


def test_processes_are_local_when_the_launcher_says_so() -> None:
    base = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "80"}
    cases = [
        ({}, False),
        ({"LOCAL_WORLD_SIZE": "2"}, True),
        ({"LOCAL_WORLD_SIZE": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "2"}, False),
    ]
    for extra, local in cases:
        found = rendezvous.launched(base | extra)
        assert found is not None
        assert found.all_local is local


@pytest.mark.slow
def test_control_waits_where_a_collective_of_tensors_gives_up() -> None:
    """A barrier and an object outlast what rank 1 does alone; a sum does not."""
    first, late = together("late")
    assert "met all" in first[1], first[1]
    assert "met all" in late[1], late[1]
    assert "gave up:" in first[1], first[1]
