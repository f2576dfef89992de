"""Each process takes a GPU of its own, however the launcher shows them, and two on one are told in a line."""

from __future__ import annotations

import re

import pytest
import torch.distributed as dist

from pipeline.core import distributed, gpus
from pipeline.core.errors import UserError
from pipeline.core.rendezvous import Launched

ALL_OF_A_HOST = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}


@pytest.mark.parametrize(
    ("environment", "visible", "expected"),
    [
        ({}, 4, 0),
        (ALL_OF_A_HOST | {"LOCAL_RANK": "3"}, 4, 3),  # --gres, torchrun, smalti run
        ({"CUDA_VISIBLE_DEVICES": "0", "LOCAL_RANK": "3"}, 1, 0),  # --gpus-per-task=1, --gpu-bind=single:1
        ({"CUDA_VISIBLE_DEVICES": "3", "LOCAL_RANK": "3"}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3d5a", "LOCAL_RANK": "1"}, 1, 0),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "LOCAL_RANK": "3"}, 2, 1),  # --gpus-per-task=2
        ({"LOCAL_RANK": "3"}, 1, 0),  # a task of an array on a machine of one GPU
        ({"LOCAL_RANK": "5"}, 2, 1),
    ],
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one(
    environment: dict[str, str], visible: int, expected: int
) -> None:
    assert gpus.own_index(environment, visible) == expected


@pytest.mark.parametrize(
    ("before", "rank", "after"),
    [
        ("MIG-a,MIG-b,MIG-c", "1", "MIG-b"),
        ("MIG-a,MIG-b", "3", "MIG-b"),
        ("MIG-a", "1", "MIG-a"),
        ("GPU-a,GPU-b", "1", "GPU-a,GPU-b"),
        ("0,1", "1", "0,1"),
        ("", "1", ""),
    ],
)
def test_of_several_mig_instances_a_process_is_left_its_own(before: str, rank: str, after: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": before, "LOCAL_RANK": rank}
    gpus.show_own_instance(environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == after
    unset = {"LOCAL_RANK": rank}
    gpus.show_own_instance(unset)
    assert unset == {"LOCAL_RANK": rank}


def test_instances_of_one_gpu_are_told_apart() -> None:
    first, second = ({"CUDA_VISIBLE_DEVICES": name} for name in ("MIG-a", "MIG-b"))
    assert gpus.identity(first, "GPU-1") != gpus.identity(second, "GPU-1")
    assert gpus.identity({}, "GPU-1") == gpus.identity(ALL_OF_A_HOST, "GPU-1") == "GPU-1"


@pytest.mark.parametrize(
    ("found", "pair"),
    [
        ([("n1", "GPU-a"), ("n1", "GPU-b"), ("n2", "GPU-c"), ("n2", "GPU-d")], None),
        ([("n1", "GPU-a"), ("n1", "GPU-b"), ("n1", "GPU-a")], "ranks 0 and 2 on the same one (GPU-a of n1)"),
        ([("n1", "GPU-a"), ("n2", "GPU-b"), ("n2", "GPU-b")], "ranks 1 and 2 on the same one (GPU-b of n2)"),
        ([("n1", "MIG-a"), ("n1", "MIG-b")], None),
    ],
)
def test_two_processes_on_one_gpu_are_refused_in_a_line(found: list[tuple[str, str]], pair: str | None) -> None:
    if pair is None:
        gpus.refuse_shared(found)
        return
    with pytest.raises(UserError, match=re.escape(pair)) as error:
        gpus.refuse_shared(found)
    assert "start no more processes than GPUs" in str(error.value)


@pytest.mark.parametrize("other", ["GPU-1", "GPU-2"])
def test_ranks_compare_their_gpus_before_they_join(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    store = dist.HashStore()
    store.set("gpu/1", f"node1 {other}")
    launches = [Launched(rank, 2, "127.0.0.1", 1, all_local=True) for rank in range(2)]
    if other == "GPU-2":
        distributed._expect_a_gpu_each(launches[0], store, "GPU-1")
        return
    for launch in launches:  # rank 0 finds it, and the other one hears of it
        with pytest.raises(UserError, match="found ranks 0 and 1 on the same one"):
            distributed._expect_a_gpu_each(launch, store, "GPU-1")


def test_a_local_rank_that_is_no_number_is_one_line() -> None:
    with pytest.raises(UserError, match="LOCAL_RANK: expected a number, found 'x'"):
        gpus.local_rank({"LOCAL_RANK": "x"})
