"""Faults that must lose nothing: real kills, a really full disk, two tasks on one shard, files swapped and bent."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.data import token_parts as parts_of_tokens
from pipeline.data.catalog import Catalog
from pipeline.data.prepare import prepare
from pipeline.data.token_parts import read_journal, token_parts
from pipeline.data.tokenize_shards import TokenizeJob, join, tokenize_shards
from pipeline.data.tokens import TokenArrays
from tests.conftest import NO_TRACKING, STAGE_NAMES, TINY
from tests.data.sample_images import folder_config, tree_bytes, write_folder
from tests.data.small_run import make_small_run, tokenize_job
from tests.launch import command, environment, launch
from tests.namespaces import namespaces

PREPARE = """
import sys
from pathlib import Path
from pipeline.data.prepare import prepare
from pipeline.core.errors import UserError
from tests.data.sample_images import folder_config
if __name__ == "__main__":
    folder, out, workers = sys.argv[1:]
    try:
        prepare(Path(out), folder_config(Path(folder), shard_size=20, image_size=32, workers=int(workers)), seed=0)
    except UserError as error:
        sys.exit(f"error: {error}")
"""
VALUES = {"shard_size": 20, "image_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images") / "in", 400)


@pytest.fixture(scope="module")
def fresh(folder: Path) -> dict[str, bytes]:
    """What an undisturbed `prepare` makes of `folder`."""
    prepare(folder.parent / "fresh", folder_config(folder, **VALUES), seed=0)
    return tree_bytes(folder.parent / "fresh")


def _script(tmp_path: Path) -> Path:
    (tmp_path / "prepare_it.py").write_text(PREPARE)
    return tmp_path / "prepare_it.py"


def _wait_for_parts(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list((out / "parts").glob("0*.json"))) < count:
        assert process.poll() is None, "ended too early to prove anything"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_worker_of_prepare_fails_the_stage_and_the_next_run_ends_with_the_same_bytes(
    folder: Path, fresh: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(_script(tmp_path)), str(folder), str(out), "2"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    _wait_for_parts(out, 2, process)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if not child.children()]
    busiest = max(workers, key=lambda worker: worker.cpu_times().user)
    busiest.kill()
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "a worker process died" in messages
    assert "finished shards are kept: run the same command again" in messages
    prepare(out, folder_config(folder, **VALUES), seed=0)
    assert tree_bytes(out) == fresh


DIES = """
import os, signal, sys
from pathlib import Path
from pipeline.data.prepare import prepare
from tests.data.sample_images import folder_config
if __name__ == "__main__":
    folder, out, name = sys.argv[1:]
    def die(event, arguments):
        if event in ("open", "os.rename") and os.path.basename(str(arguments[0])).startswith(name):
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    prepare(Path(out), folder_config(Path(folder), shard_size=20, image_size=32, workers=1), seed=0)
"""


@pytest.mark.parametrize("name", ["train.captions", ".train.checksums", ".index.json"])
def test_killed_while_it_replaces_a_catalog_prepare_ends_with_the_same_bytes_and_neither_is_read_as_the_other(
    name: str, tmp_path: Path
) -> None:
    folder, out = write_folder(tmp_path / "in", 12), tmp_path / "out"
    prepare(out, folder_config(folder, **VALUES), seed=0)
    write_folder(folder, 12, start=20)
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, str(tmp_path / "dies.py"), str(folder), str(out), name]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="(catalog/|)train.* is .*damaged.*run the stage prepare again"):
        Catalog(out, "train").verify()  # by the index of before
    prepare(out, folder_config(folder, **VALUES), seed=0)
    prepare(tmp_path / "undisturbed", folder_config(folder, **VALUES), seed=0)
    assert tree_bytes(out) == tree_bytes(tmp_path / "undisturbed")


def _on_small_disk(
    size: str, larger: str, disk: Path, command: list[str], copy_to: Path
) -> subprocess.CompletedProcess[str]:
    """Run `command` with `disk` a file system of `size`; make it `larger`; run it again; copy what is there."""
    again = f'mount -o remount,size={larger} "$DISK" && "$@" && cp -a "$DISK"/. "$COPY"'
    script = f'mount -t tmpfs -o size={size} none "$DISK" || exit; "$@" && exit 78; echo --- >&2; {again}'
    return subprocess.run(
        [*namespaces(), "sh", "-c", script, "sh", *command],
        env=environment(DISK=str(disk), COPY=str(copy_to)),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.machine
def test_full_disk_stops_prepare_with_one_line_and_nothing_is_lost(
    folder: Path, fresh: dict[str, bytes], tmp_path: Path
) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    command = [sys.executable, str(_script(tmp_path)), str(folder), str(disk), "1"]
    done = _on_small_disk("600k", "20m", disk, command, copy)
    assert done.returncode == 0, done.stderr
    assert "error: no space left for" in done.stderr.partition("---")[0]
    assert "(nothing that was there is lost)" in done.stderr
    assert tree_bytes(copy) == fresh


# --- tokenize ----------------------------------------------------------------------------------------------------


FILES = 3  # of a split: of some shards each


@pytest.fixture(scope="module", autouse=True)
def few_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_of_tokens, "PARTS", FILES)
        yield


@pytest.fixture(scope="module")
def run(few_files: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the tokenizers, and in tokenize/ what an undisturbed tokenize makes (4 crops)."""
    return make_small_run(tmp_path_factory.mktemp("run"), 200, TokenizeConfig(crops=4, batch_size=8))


def _task(run: Path, out: Path, task: int, tasks: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.data.small_run", str(run), str(out), str(task), str(tasks), "4", str(FILES)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _finish(run: Path, out: Path) -> int:
    """What the stage does: what is missing, then the join. Returns how many shards were missing."""
    job = _job(run, out)
    made = list(tokenize_shards(job, token_parts(job.prepare_dir)))
    join(job)
    return sum(made)


def _job(run: Path, out: Path) -> TokenizeJob:
    return tokenize_job(run, out, TokenizeConfig(crops=4, batch_size=8))


@pytest.mark.slow
def test_killed_tokenize_task_resumes_and_ends_with_the_same_bytes(run: Path, tmp_path: Path) -> None:
    shards = sum(len(part.shards) for part in token_parts(run / "prepare"))
    for finished in (1, 4):
        process = _task(run, tmp_path, 0, 1)
        assert process.stdout is not None
        for _ in range(finished):
            assert process.stdout.readline().startswith("done")
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = sum(len(read_journal(path)) for path in tmp_path.glob("*/*.tokens"))
    assert 4 <= done < shards, "killed too late to prove anything"
    assert _finish(run, tmp_path) == shards - done, "a finished shard was made again, or one is missing"
    assert tree_bytes(tmp_path) == tree_bytes(run / "tokenize")


@pytest.mark.slow
def test_two_tasks_share_the_shards_and_two_that_are_given_the_same_ones_do_no_harm(run: Path, tmp_path: Path) -> None:
    # Tasks 0 and 1 of 2 split the work; the third was given task 0's shards again.
    tasks = [_task(run, tmp_path, task, 2) for task in (0, 1, 0)]
    for task in tasks:
        _, errors = task.communicate(timeout=300)
        assert task.returncode == 0, errors
    assert _finish(run, tmp_path) == 0
    assert tree_bytes(tmp_path) == tree_bytes(run / "tokenize")


def test_tokenize_in_two_processes_one_of_them_killed_resumes_and_ends_with_the_same_bytes(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    before = tree_bytes(run / "tokenize")
    shutil.rmtree(run / "tokenize")
    smalti = command("pipeline", ["run", str(TINY), f"runs={tmp_path}", "processes=2", NO_TRACKING])
    process = subprocess.Popen(smalti, env=environment(), stderr=subprocess.PIPE, text=True)
    records = sorted(name for name in before if re.fullmatch(r"(train|val)/\d+\.journal", name))
    second = next(run / "tokenize" / name for name in records[1::2])  # the first shard of the second task
    deadline = time.monotonic() + 120
    while not len(read_journal(second)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    running = [child for child in psutil.Process(process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    tasks = {child.cmdline()[-1]: child for child in running}
    assert set(tasks) <= {"0/2", "1/2"}
    tasks["1/2"].kill()
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "tokenize was killed by SIGKILL" in messages
    assert not (run / "tokenize" / "_SUCCESS").exists()
    journals = [path for path in (run / "tokenize").glob("*/*.journal") if len(read_journal(path))]
    done = {path: path.stat().st_mtime_ns for path in journals}
    assert len(done) < len(records), "killed too late to prove anything"
    output = subprocess.run(smalti, env=environment(), stderr=subprocess.PIPE, text=True, check=True).stderr
    up_to_date = {line.split()[0] for line in output.splitlines() if line.endswith("up to date")}
    assert set(STAGE_NAMES) - up_to_date == {"tokenize"}, "what reads these arrays must not notice"
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a finished shard was made again"
    assert (run / "tokenize" / "tasks" / "0-of-2").exists()
    assert (run / "tokenize" / "tasks" / "1-of-2").exists()
    results = [name for name in before if name.startswith(("train", "val", "index"))]
    assert {name: (run / "tokenize" / name).read_bytes() for name in results} == {
        name: before[name] for name in results
    }


@pytest.mark.parametrize("verify", ["background", "first"])
def test_a_flipped_byte_stops_the_transformer_before_it_is_finished_or_begins_and_is_made_good(
    verify: str, tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    array = run / "tokenize/train/001.tokens"
    whole = array.read_bytes()
    array.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    arguments = [str(TINY), f"runs={tmp_path}", "transformer.layers=1", NO_TRACKING]  # another model, same arrays
    arguments.append(f"transformer.verify={verify}")
    output = launch("stages.transformer", "--config", *arguments, check=False)
    assert "train/001.tokens is damaged between bytes 0 and" in output
    assert not (run / "transformer/model").exists()
    if verify == "first":
        assert not list((run / "transformer").glob("checkpoints/*"))
    else:
        assert "checkpoints since this start may have learned from it" in output
    array.unlink()
    launch("stages.tokenize", "--config", *arguments)
    assert array.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.machine
def test_full_disk_stops_tokenize_with_one_line_and_nothing_is_lost(run: Path, tmp_path: Path) -> None:
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    copy.mkdir()
    command = [sys.executable, "-m", "tests.data.small_run", str(run), str(disk), "0", "1", "4", str(FILES)]
    done = _on_small_disk("80k", "20m", disk, command, copy)
    assert done.returncode == 0, done.stderr
    assert "no space left for" in done.stderr.partition("---")[0]
    assert _finish(run, copy) == 0
    assert tree_bytes(copy) == tree_bytes(run / "tokenize")


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_tar_replaced_by_another_of_the_same_name_is_not_tokenized(own_run: Path) -> None:
    tars = [own_run / "prepare/train" / f"{n:06d}.tar" for n in (0, 1)]
    tars[0].write_bytes(tars[1].read_bytes())
    shutil.copy(tars[1].with_suffix(".index.npy"), tars[0].with_suffix(".index.npy"))
    shutil.rmtree(own_run / "tokenize")
    with pytest.raises(UserError, match=r"000000\.tar is not the shard that prepare wrote: expected sha256"):
        _finish(own_run, own_run / "tokenize")


def test_a_record_that_was_not_written_to_its_end_is_none(own_run: Path) -> None:
    out = own_run / "tokenize"
    before = tree_bytes(out)
    journal = out / "train/001.journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    assert _finish(own_run, out) == 1
    assert tree_bytes(out) == before


def test_a_flipped_byte_in_the_records_of_all_shards_is_told(own_run: Path) -> None:
    records = own_run / "tokenize/train.shards"
    content = bytearray(records.read_bytes())
    content[3] ^= 1
    records.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.shards is missing or damaged: expected sha256"):
        TokenArrays(own_run / "tokenize", "train")


def test_one_flipped_byte_in_an_array_is_found_by_its_checksum_and_only_that_shard_is_made_again(own_run: Path) -> None:
    out = own_run / "tokenize"
    before = tree_bytes(out)
    array = out / "train/001.tokens"
    begin = int(read_journal(array)["record"]["begin"][1])  # of the second of its shards
    content = bytearray(array.read_bytes())
    content[begin] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=rf"train/001\.tokens is damaged between bytes {begin} and"):
        TokenArrays(out, "train").verify()
    assert _finish(own_run, out) == 1
    assert tree_bytes(out) == before
