"""Training state on disk: any range of a tensor, from the files of however many processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.errors import UserError
from pipeline.core.manifest import FileRecord
from pipeline.training.checkpoint_files import shares, write_files
from pipeline.training.engines.base import expect_same_shapes
from pipeline.training.sharded_state import ShardedState, TensorShard, shards_file

WRITTEN = {"ema": 1, "training": 3}  # kind -> about so many thousand bytes


@pytest.fixture
def three_processes(tmp_path: Path) -> Path:
    """0, 1, 2 ... 9 of `w` in the files of three processes, the middle ones twice."""
    whole = torch.arange(10.0)
    for rank, (start, end) in enumerate([(0, 4), (3, 8), (8, 10)]):
        save_file({f"w@{start}": whole[start:end]}, tmp_path / f"state-{rank:05d}.safetensors")
    return tmp_path


@pytest.mark.parametrize(("start", "length"), [(0, 10), (2, 5), (7, 2), (9, 1)])
def test_any_part_is_put_together(start: int, length: int, three_processes: Path) -> None:
    out = torch.empty(length)
    ShardedState(three_processes, "state").read_into("w", start, out)
    assert out.tolist() == list(range(start, start + length))


def test_what_nobody_wrote_is_told(three_processes: Path) -> None:
    with pytest.raises(UserError, match=r"expected element 10 of w, found none; was it made by another optimizer"):
        ShardedState(three_processes, "state").read_into("w", 9, torch.empty(2))


def test_what_is_written_comes_back_bit_by_bit(tmp_path: Path) -> None:
    value = torch.randn(3, 5).T  # not contiguous
    write_files(tmp_path, dict([shards_file("ema", [TensorShard("blocks.0.weight", 0, value)])]))
    out = torch.empty(15)
    ShardedState(tmp_path, "ema").read_into("blocks.0.weight", 0, out)
    assert torch.equal(out.view(5, 3), value)


def test_a_checkpoint_of_another_shape_is_refused_with_what_was_expected_and_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected head.weight of shape \[4, 8\], found \[4, 16\]"):
        expect_same_shapes({"head.weight": [4, 8], "a": [1]}, {"head.weight": [4, 16], "a": [1]}, tmp_path)
    with pytest.raises(UserError, match=r"expected extra of shape none, found \[2\]"):
        expect_same_shapes({"a": [1]}, {"a": [1], "extra": [2]}, tmp_path)


@pytest.mark.parametrize("ranks", [1, 3, 8, 11])
def test_each_file_of_a_checkpoint_is_in_the_share_of_one_process_and_its_own_where_as_many_wrote_them(
    ranks: int,
) -> None:
    sizes = {f"{kind}-{rank:05d}.safetensors": 1000 * n - rank for kind, n in WRITTEN.items() for rank in range(8)}
    files: dict[str, FileRecord] = {name: {"bytes": size, "sha256": ""} for name, size in sizes.items()}
    found = shares(files | {"trainer.json": {"bytes": 10, "sha256": ""}}, ranks)
    assert sorted(name for share in found for name in share) == sorted([*files, "trainer.json"])
    if ranks == 8:
        for rank, share in enumerate(found):
            assert {f"{kind}-{rank:05d}.safetensors" for kind in WRITTEN} <= set(share)
    most = max(sum(sizes.get(name, 0) for name in share) for share in found)
    assert most <= sum(sizes.values()) / ranks + max(sizes.values())


@pytest.mark.parametrize("ranks", [1, 3, 8, 11])
def test_each_block_of_a_checkpoint_is_in_the_share_of_one_process_and_shares_are_as_large_to_a_block(
    ranks: int,
) -> None:
    files: dict[str, FileRecord] = {}
    for kind, n in WRITTEN.items():
        for rank in range(8):
            size = 1000 * n - rank
            blocks = [(start, "") for start in range(0, size, 64)]
            files[f"{kind}-{rank:05d}.safetensors"] = {"bytes": size, "block_bytes": 64, "blocks": blocks}
    found = shares(files, ranks)
    for name, recorded in files.items():
        assert [block for share in found if name in share for block in share[name]["blocks"]] == recorded["blocks"]
    average = sum(recorded["bytes"] for recorded in files.values()) / ranks
    for share in found:
        assert abs(sum(64 * len(recorded["blocks"]) for recorded in share.values()) - average) <= 64 * (len(share) + 1)
