"""A process that its launcher shows one GPU alone trains on that one, whatever its number on the node is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.core.loopback import LOOPBACK, free_port
from tests.launch import launch


@pytest.mark.parametrize("kind", ["accelerate", "deepspeed"])
def test_libraries_take_the_one_gpu_that_a_process_is_shown(kind: str, tmp_path: Path) -> None:
    second = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}
    second |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
    output = launch("tests.training.one_gpu_shown_worker", kind, str(tmp_path), **second)
    found = json.loads(output.splitlines()[-1])
    assert found == {"wanted": [0], "local_rank": 1}  # and who asks which process of the node this is, hears the truth
