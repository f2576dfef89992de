"""The preflight tells a bad host from a slow one, with ranks in threads of this process."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.core.loopback import LOOPBACK, free_port
from pipeline.slurm import device_check, preflight
from pipeline.slurm.device_check import counter_fault, device_problem, hardware_xids, slow_hosts
from pipeline.slurm.preflight import BAD_HOSTS, LATE, MISTAKE, NO_HOST_TO_BLAME, Verdict, follow, lead
from pipeline.slurm.roll_call import Announced, RollCall
from tests.launch import environment

Measured = dict[str, object]
FINE: Measured = {"failure": "", "gb_per_s": 1.0, "tflops": 1.0}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[int, Measured]:
    """What the ranks measure, by rank, to be changed by a test."""
    values: dict[int, Measured] = {}
    monkeypatch.setattr(preflight, "_measure", lambda rank, *_: values.get(rank, FINE))
    return values


def _hold(
    hosts: list[str],
    timeout_s: float = 5.0,
    problems: dict[int, str] | None = None,
    ranks: dict[int, Callable[[Announced], None]] | None = None,
    gpus: list[str] | None = None,
) -> Verdict:
    """A preflight with a rank on each of `hosts`; `ranks`: those that do something else than they should."""
    gpus = gpus or [""] * len(hosts)
    port, problems = free_port(), problems or {}
    call = RollCall(port, len(hosts))
    call.note(0, host=hosts[0])

    def other(rank: int) -> None:
        announced = Announced(LOOPBACK, port, rank, hosts[rank], timeout_s)
        if ranks and rank in ranks:
            ranks[rank](announced)
        else:
            follow(announced, rank, len(hosts), problems.get(rank), timeout_s, gpus[rank])

    for rank in range(1, len(hosts)):
        if hosts[rank]:
            threading.Thread(target=other, args=(rank,), daemon=True).start()
    names = ["a", "b"]
    return lead(call, len(hosts), names, problems.get(0), timeout_s, gpus[0])


def test_ranks_announce_themselves_before_they_import_torch() -> None:
    code = "import sys, pipeline.cli.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_a_rank_that_takes_longer_than_the_patience_to_import_is_waited_for(measured: dict[int, Measured]) -> None:
    def slow(announced: Announced) -> None:
        time.sleep(1.0)
        follow(announced, 1, 2, None, 0.4)

    assert _hold(["a", "b"], 0.4, ranks={1: slow}) == Verdict()


def test_a_host_that_does_not_come_is_late_and_not_bad(measured: dict[int, Measured]) -> None:
    verdict = _hold(["a", ""], 0.3)
    assert (verdict.exit_code, verdict.bad) == (LATE, {})
    assert "1 ranks did not come" in verdict.late
    assert "nothing was heard of b" in verdict.late


@pytest.mark.slow
def test_the_patience_counts_from_the_first_arrival(measured: dict[int, Measured]) -> None:
    started = time.monotonic()
    call = RollCall(free_port(), 2)
    time.sleep(0.5)
    call.note(0, host="a")
    lead(call, 2, ["a", "b"], None, 0.5)
    assert time.monotonic() - started >= 1.0


def test_a_rank_that_dies_in_its_check_ends_the_wait_and_excludes_nobody(measured: dict[int, Measured]) -> None:
    def die(announced: Announced) -> None:
        announced._thread.join()
        assert announced._connection
        announced._connection.close()

    verdict = _hold(["a", "b"], 60.0, ranks={1: die})
    assert (verdict.exit_code, verdict.late) == (LATE, "rank 1 on b ended during its check: see its lines")


def test_a_problem_is_of_the_host_that_the_rank_names_however_ranks_are_dealt_out(
    measured: dict[int, Measured],
) -> None:
    verdict = _hold(["a", "b", "a", "b"], problems={2: "GPU 1 has 3 of 80 GB free"})
    assert (verdict.exit_code, verdict.bad) == (BAD_HOSTS, {"a": "GPU 1 has 3 of 80 GB free"})


def test_ranks_on_one_gpu_are_a_mistake_that_is_told_before_nccl_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_measure", lambda *_: pytest.fail("the all-reduce was tried"))
    verdict = _hold(["a", "b", "b"], gpus=["GPU-1", "GPU-2", "GPU-2"])
    assert (verdict.exit_code, verdict.bad) == (MISTAKE, {})
    assert "found ranks 1 and 2 on the same one (GPU-2 of b)" in verdict.mistake


def test_an_all_reduce_that_fails_on_one_host_or_on_all(measured: dict[int, Measured]) -> None:
    measured[1] = {"failure": "rank 1: expected a sum of 3, found 2"}
    assert _hold(["a", "b"]).bad == {"b": "rank 1: expected a sum of 3, found 2"}
    measured[0] = {"failure": "rank 0: RuntimeError: connection closed"}
    assert _hold(["a", "b"]).exit_code == NO_HOST_TO_BLAME


def test_who_connects_as_soon_as_it_may_reaches_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = threading.Event()

    def eager(announced: Announced) -> None:
        announced.say(problem="")
        assert announced.hear(5.0) == "go"
        with socket.create_connection((LOOPBACK, announced._port)):
            connected.set()
            time.sleep(0.3)
            announced.say(**FINE)
            time.sleep(0.3)

    def serve(rank: int, _processes: int, _timeout_s: float, listener: int | None = None) -> Measured:
        assert connected.wait(5.0)
        time.sleep(0.3)  # the roll call would have taken it meanwhile
        with socket.socket(fileno=listener) as store:
            store.settimeout(5.0)
            store.accept()
        return FINE

    monkeypatch.setattr(preflight, "_measure", serve)
    assert _hold(["a", "b"], ranks={1: eager}) == Verdict()


def test_a_slow_gpu_makes_its_host_bad_and_a_slow_processor_is_only_told(measured: dict[int, Measured]) -> None:
    measured.update({rank: FINE | {"on_gpu": True} for rank in range(3)})
    measured[3] = FINE | {"on_gpu": True, "tflops": 0.4}
    hosts = ["a", "a", "a", "b"]
    assert _hold(hosts).bad == {"b": "a matrix product on rank 3 ran at 0.4 TFLOP/s, the median is 1"}
    measured[0] = FINE
    verdict = _hold(hosts)
    assert (verdict.exit_code, len(verdict.notes)) == (0, 1)
    assert verdict.notes[0].startswith("b is slow: a matrix product on rank 3")


def _rank_0_of_120(folder: Path, open_files: tuple[int, int]) -> tuple[int, str]:
    """The exit code and the words of the real rank 0, whose soft and hard limit these are; the last rank is broken."""
    port, ranks = free_port(), 120
    own = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": str(ranks), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port)}
    arguments = [str(folder), "--stage", "x", "--hosts", "a,b", "--bad-hosts", str(folder / "bad"), "--timeout-s", "10"]
    rank_0 = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli.preflight", *arguments],
        env=environment(**own, SLURMD_NODENAME="a"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, open_files),
    )
    others = [Announced(LOOPBACK, port, rank, "b", 60) for rank in range(1, ranks)]
    for number, other in enumerate(others, 2):
        threading.Thread(target=other.say, kwargs={"problem": "broken" * (number == ranks)}, daemon=True).start()
    said = rank_0.communicate(timeout=300)[1]
    return rank_0.returncode, said


def test_more_ranks_than_the_soft_limit_of_open_files_all_come(tmp_path: Path) -> None:
    code, said = _rank_0_of_120(tmp_path, (64, 4096))
    assert (code, said) == (BAD_HOSTS, "preflight: bad host b: broken\n")


def test_a_hard_limit_of_open_files_that_is_too_low_is_told_in_a_line(tmp_path: Path) -> None:
    code, said = _rank_0_of_120(tmp_path, (64, 128))
    assert (code, len(said.splitlines())) == (MISTAKE, 1), said
    assert "rank 0 of 120 processes to be allowed" in said
    assert "found 128" in said


def test_the_sum_of_the_all_reduce_is_exact_for_any_number_of_ranks() -> None:
    for processes in (1, 2, 6_001, 20_000):
        added = np.cumsum([preflight.share(rank) for rank in range(processes)], dtype=np.float32)
        assert added[-1] == sum(map(preflight.share, range(processes)))


SLOW = """
import time
import torch
product = torch.Tensor.__matmul__
torch.Tensor.__matmul__ = lambda a, b: (time.sleep(0.5), product(a, b))[1]
"""


def _three_ranks(run: Path, folder: Path, changes: dict[int, str], timeout_s: int = 120) -> list[subprocess.Popen[str]]:
    """Real ranks, of which the last is on host b and the others on a; `changes`: of a rank's Python, by rank."""
    arguments = [str(run), "--stage", "transformer", "--hosts", "a,b", "--bad-hosts", str(folder / "bad")]
    meeting = {"WORLD_SIZE": "3", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, node in ((0, "a"), (1, "a"), (2, "b")):
        paths = [environment()["PYTHONPATH"]]
        if rank in changes:
            (folder / str(rank)).mkdir()
            (folder / str(rank) / "sitecustomize.py").write_text(changes[rank])
            paths.insert(0, str(folder / str(rank)))
        # Only who is the first of its host looks at the inputs.
        local_rank = "01"[rank == 1 or not (run / "config.yaml").exists()]
        own = {"RANK": str(rank), "LOCAL_RANK": local_rank, "SLURMD_NODENAME": node}
        variables = environment(**meeting, **own, PYTHONPATH=os.pathsep.join(paths))
        command = [sys.executable, "-m", "pipeline.cli.preflight", *arguments, "--timeout-s", str(timeout_s)]
        ranks.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    return ranks


@pytest.mark.slow
def test_three_real_ranks_multiply_and_all_reduce_and_a_slow_one_is_named_by_its_nodes_name(
    tiny_run: Path, tmp_path: Path
) -> None:
    ranks = _three_ranks(tiny_run, tmp_path, {2: SLOW})
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    assert "preflight passed: 3 processes on a, b (hosts and all-reduce, " in said[0]
    assert "preflight: b is slow: a matrix product on rank 2 ran at " in said[0]
    assert "a is slow: a matrix product" not in said[0]
    assert not (tmp_path / "bad").exists()  # a processor may be shared, and slow for a moment


AT_THE_ALL_REDUCE = """
import os, signal, time
from pipeline.slurm import preflight
preflight._measure = lambda *_: {}
"""
STOPS = AT_THE_ALL_REDUCE.format("os.kill(os.getpid(), signal.SIGSTOP)")
DIES = AT_THE_ALL_REDUCE.format("os.kill(os.getpid(), signal.SIGKILL)")
WAITS_FOR_EVER = AT_THE_ALL_REDUCE.format("time.sleep(10_000)")  # as NCCL does while it connects


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({2: STOPS}, "rank 2 did not end the all-reduce"),
        ({2: DIES}, "rank 2 died in the all-reduce"),
        ({0: WAITS_FOR_EVER, 1: WAITS_FOR_EVER, 2: DIES}, "rank 2 died in the all-reduce"),
    ],
)
def test_a_rank_that_hangs_or_dies_in_the_all_reduce_makes_its_host_bad_and_no_other(
    changes: dict[int, str], why: str, tmp_path: Path
) -> None:
    ranks = _three_ranks(tmp_path, tmp_path, changes, timeout_s=5)
    try:
        said = ranks[0].communicate(timeout=60)[1]
        assert ranks[0].returncode == BAD_HOSTS, said
        assert f"preflight: bad host b: {why}" in said
        assert (tmp_path / "bad").read_text() == "b\n"
        assert ranks[1].wait(60) == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
def test_ranks_that_all_wait_for_ever_in_the_all_reduce_leave_no_host_to_blame(tmp_path: Path) -> None:
    ranks = _three_ranks(tmp_path, tmp_path, dict.fromkeys(range(3), WAITS_FOR_EVER), timeout_s=5)
    try:
        assert [rank.wait(60) for rank in ranks] == [NO_HOST_TO_BLAME, 0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_half_of_the_median_is_the_limit() -> None:
    hosts = dict(enumerate("aabbcc"))
    assert slow_hosts(dict.fromkeys(range(6), 7.0), hosts, "x", "u") == {}
    assert slow_hosts({0: 10, 1: 10, 2: 10, 3: 5, 4: 10, 5: 10}, hosts, "x", "u") == {}
    found = slow_hosts({0: 10, 1: 10, 2: 10, 3: 4.9, 4: 10, 5: 1}, hosts, "x", "u")
    assert found == {
        "c": "x on rank 5 ran at 1 u, the median is 10",
        "b": "x on rank 3 ran at 4.9 u, the median is 10",
    }
    assert slow_hosts({0: 1.0}, hosts, "x", "u") == {}  # nothing to compare with


def test_the_drivers_counters_and_the_kernels_lines_name_broken_hardware() -> None:
    fine = {
        "ecc.errors.uncorrected.volatile.total": "0",
        "retired_pages.pending": "[N/A]",
        "remapped_rows.failure": "No",
    }
    assert counter_fault(fine) is None
    assert counter_fault(fine | {"remapped_rows.failure": "Yes"}) == "remapped_rows.failure=Yes"
    log = "\n".join(
        [
            "[1.0] NVRM: Xid (PCI:0000:18:00): 31, pid=1, name=python, MMU Fault",  # a bug of a program
            "[2.0] NVRM: Xid (PCI:0000:18:00): 79, pid='<unknown>', GPU has fallen off the bus.",
        ]
    )
    assert [line[:6] for line in hardware_xids(log)] == ["[2.0] "]


class Driver:
    """A GPU of 80 GB by torch, and the program that shows the driver's counters; a test breaks one of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.visible, self.free_gb, self.error = True, 79.0, ""
        self.program = folder / "nvidia-smi"
        self.answers("remapped_rows.failure", "No")
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
        monkeypatch.setattr(device_check, "_has_driver", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.visible)
        monkeypatch.setattr(device_check.distributed, "device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self._memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))

    def answers(self, counter: str, value: str) -> None:
        """Of GPU-1-2 this counter has this value, ECC is not supported, and the driver is too old for the others."""
        self.program.write_text(f"""#!/bin/sh
case "$*" in
  *--id=GPU-1-2*query-gpu={counter}) echo {value} ;;
  *--id=GPU-1-2*query-gpu=ecc*) echo '[N/A]' ;;
  *) echo "Field is not a valid field to query."; exit 2 ;;
esac
""")
        self.program.chmod(0o755)

    def _memory(self, _device: int) -> tuple[int, int]:
        if self.error:
            raise RuntimeError(f"{self.error}\nCUDA kernel errors might be reported asynchronously")
        return int(self.free_gb * 1e9), int(80e9)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


def test_a_gpu_that_is_missing_held_failing_or_worn_out_is_named(driver: Driver) -> None:
    assert device_problem() is None
    driver.answers("ecc.errors.uncorrected.volatile.total", "2")
    assert device_problem() == "GPU 0: the driver says ecc.errors.uncorrected.volatile.total=2"
    driver.answers("remapped_rows.pending", "Yes")
    assert device_problem() == "GPU 0: the driver says remapped_rows.pending=Yes"
    driver.free_gb = 40.0
    assert device_problem() == "GPU 0 has 40 of 80 GB free: another process holds it"
    driver.error = "CUDA error: uncorrectable ECC error encountered"
    assert device_problem() == f"GPU 0 cannot be used: {driver.error}"
    driver.visible = False
    assert device_problem() == "expected a GPU, found none that torch can use"


def test_without_the_drivers_program_a_gpu_counts_as_fine(driver: Driver) -> None:
    driver.program.unlink()
    assert device_problem() is None
