"""At a training's start one process a node looks at its inputs; what one node sees otherwise, all are told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.loopback import LOOPBACK, free_port
from pipeline.orchestration.graph import stage_named
from tests.launch import environment
from tests.orchestration.recorded_run import recorded_run

pytestmark = pytest.mark.slow  # processes that import torch
INPUTS = len(stage_named("transformer").inputs)


def on_two_nodes(places: list[tuple[int, int]], first: Path, second: Path) -> list[str]:
    """What each process, at (node, local rank), says; these are the runs that the nodes see."""
    common = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    common |= {"LOCAL_WORLD_SIZE": "1", "SMALTI_SUBMITTED": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.orchestration.node_files_worker", str((first, second)[node])],
            env=environment(RANK=str(rank), LOCAL_RANK=str(local), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (node, local) in enumerate(places)
    ]
    return [process.communicate(timeout=300)[0] for process in processes]


def test_one_process_a_node_looks_once_at_each_file_and_reads_each_manifest_once(tmp_path: Path) -> None:
    recorded_run(tmp_path)
    outputs = on_two_nodes([(0, 0), (0, 1), (1, 0)], tmp_path, tmp_path)
    found = [re.search(r"^looked (\d+) opened (\d+)$", said, re.MULTILINE) for said in outputs]
    assert all(found), outputs
    assert [int(one[1]) for one in found if one] == [INPUTS, 0, INPUTS]
    _, neighbor, other_node = [int(one[2]) for one in found if one]
    assert neighbor == 0
    assert other_node == 2 * INPUTS  # each once to hash it, once to read it


@pytest.mark.parametrize("fault", ["a file that is not there", "another result"])
def test_what_the_other_node_sees_otherwise_is_told_to_all_before_the_stage_begins(fault: str, tmp_path: Path) -> None:
    ours, theirs = recorded_run(tmp_path / "ours"), recorded_run(tmp_path / "theirs")
    output = theirs.stage("tokenize") / "output.txt"
    if fault == "another result":
        output.write_text("made of others")
        theirs.finish(stage_named("tokenize"), {output: None})
        expected = (
            rf"{theirs.stage('tokenize')}/manifest.json on \S+: expected that of \w+, as rank 0 sees, found that of"
        )
    else:
        size = output.stat().st_size
        output.unlink()
        expected = rf"{output} on \S+: expected {size} bytes, found no file"
    told = re.compile(f"^error: transformer: {expected}.*: see that all nodes mount the same", re.MULTILINE)
    outputs = on_two_nodes([(0, 0), (1, 0)], tmp_path / "ours", tmp_path / "theirs")
    assert all(told.search(said) for said in outputs), outputs
    assert not (ours.stage("transformer") / "_SUCCESS").exists()
