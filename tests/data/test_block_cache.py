"""Promises of the cache of blocks: fetched once on a node, safe to kill, bounded, and never wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.data.block_cache import BlockCache
from tests.data.cache_worker import SIZE, content, read
from tests.launch import environment
from tests.namespaces import namespaces


def _start(folder: Path, log: Path, blocks: int, fetch_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.cache_worker", str(folder), str(log), str(blocks), str(fetch_s)]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def _fetched(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


def test_two_ranks_that_want_the_same_blocks_fetch_each_once(tmp_path: Path) -> None:
    ranks = [_start(tmp_path / "cache", tmp_path / "log", 8, 0.05) for _ in range(2)]
    for rank in ranks:
        _go(rank)
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["right\n", "right\n"]
    assert sorted(_fetched(tmp_path / "log")) == list(range(8))


def test_threads_of_a_process_that_want_the_same_block_fetch_it_once(tmp_path: Path) -> None:
    cache, found = BlockCache(tmp_path / "cache", 1 << 30), []
    threads = [threading.Thread(target=lambda: found.append(read(cache, tmp_path / "log", 1, 0.05))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert _fetched(tmp_path / "log") == [1]


def test_a_process_killed_while_it_fills_the_cache_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed, waiting = _start(cache, log, 4, 0.3), _start(cache, log, 4, 0.0)
    _go(killed)
    while not (parts := list(cache.rglob("*.part"))):
        time.sleep(0.001)
    killed.kill()  # SIGKILL
    killed.wait()
    # As far as it may have come: with half of a block in the file, and with all but the checksum.
    for part, size in zip(parts, (SIZE // 2, SIZE), strict=False):
        part.write_bytes(content(9)[:size])
    _go(waiting)
    assert waiting.communicate(timeout=120)[0] == "right\n"
    assert not list(cache.rglob("*.part"))
    again = BlockCache(cache, 1 << 30)
    before = _fetched(log)
    assert all(read(again, log, number, 0.0) for number in range(4))
    assert _fetched(log) == before


def test_a_rank_does_not_wait_for_one_that_was_killed(tmp_path: Path) -> None:
    cache, log = tmp_path / "cache", tmp_path / "log"
    killed, waiting = _start(cache, log, 1, 600.0), _start(cache, log, 1, 0.0)
    _go(killed)
    while not list(cache.rglob("*.part")):
        time.sleep(0.001)
    _go(waiting)
    time.sleep(0.3)
    assert waiting.poll() is None
    killed.kill()
    killed.wait()
    assert waiting.communicate(timeout=120)[0] == "right\n"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_block_is_fetched_again(damage: str, tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    assert read(BlockCache(folder, 1 << 30), log, 5, 0.0)
    block = folder / "blocks/000005"
    whole = block.read_bytes()
    flipped = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    block.write_bytes({"flip": flipped, "cut": whole[:-1], "empty": b""}[damage])
    assert read(BlockCache(folder, 1 << 30), log, 5, 0.0)
    assert _fetched(log) == [5, 5]
    assert block.read_bytes() == whole


def test_the_blocks_that_were_not_used_for_longest_make_room(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    cache = BlockCache(folder, 10 * (SIZE + 4))
    for number in range(10):
        assert read(cache, log, number, 0.0)
        os.utime(folder / f"blocks/{number:06d}", (number, number))
    os.utime(folder / "blocks/000000")  # used again
    assert read(cache, log, 10, 0.0)
    left = sorted(int(path.name) for path in (folder / "blocks").iterdir())
    assert left == [0, *range(12 - len(left), 11)]
    assert 8 <= len(left) <= 9  # no more than has to make room goes, but for the tenth that is freed ahead


def test_what_others_removed_keeps_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.block_cache._LOOK_S", 0.0)
    folder, log = tmp_path / "cache", tmp_path / "log"
    mine = BlockCache(folder, 4 * (SIZE + 4))
    assert all(read(mine, log, number, 0.0) for number in range(4))
    other = BlockCache(folder, 4 * (SIZE + 4))
    assert all(read(other, log, number, 0.0) for number in range(10, 14))
    assert read(other, log, 13, 0.0)
    assert read(mine, log, 13, 0.0)
    assert [key for key in mine._held if not mine._path(key).exists()] == []


def test_a_cache_that_is_deleted_is_made_anew(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    cache = BlockCache(folder, 1 << 30)
    assert read(cache, log, 1, 0.0)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert all(read(cache, log, number, 0.0) for number in (1, 2, 2))


_FULL = """
import logging, sys
from pathlib import Path
from pipeline.data.block_cache import BlockCache
from tests.data.cache_worker import read
logging.basicConfig(format="%(message)s")
cache = BlockCache(Path(sys.argv[1]), 1 << 40)
assert all([read(cache, Path(sys.argv[2]), number, 0.0) for number in range(40)])
print(sum(path.stat().st_size for path in Path(sys.argv[1]).rglob("0*")))
del cache  # which keeps what it has read open
filler = Path(sys.argv[1]).parent / "filler"
for path in Path(sys.argv[1]).rglob("0*"): path.unlink()
try:
    with open(filler, "wb", buffering=0) as file:
        while True: file.write(bytes(4096))
except OSError: pass
cache = BlockCache(Path(sys.argv[1]), 1 << 40)
assert all([read(cache, Path(sys.argv[2]), number, 0.0) for number in range(40, 80)])
"""


@pytest.mark.slow
@pytest.mark.machine
def test_on_a_full_disk_old_blocks_make_room_and_with_none_blocks_are_used_without_being_kept(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=1m none "$DISK" && exec "$@"'
    command = [*namespaces(), "sh", "-c", script, "sh", sys.executable, "-c", _FULL]
    arguments = [str(disk / "cache"), str(tmp_path / "log")]
    done = subprocess.run([*command, *arguments], env=environment(DISK=str(disk)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 1 << 20
    assert _fetched(tmp_path / "log") == list(range(80))
    assert done.stderr.count("no space left for the cache of object stores") == 1


def test_a_cache_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder for the cache .*: set store.cache to a folder on a disk"):
        BlockCache(tmp_path / "file", 1 << 30)
