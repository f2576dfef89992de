"""`kill -9` while parts are compared and written again, and sources that go away halfway: nothing is lost or mixed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from tests.data.sample_images import encoded, image, prepare_config, tree_bytes, write_tar
from tests.launch import environment

TARS, EACH = 4, 6

DIES = """
import os, signal, sys
from pathlib import Path
from pipeline.data import spilled
from pipeline.data.prepare import prepare
from tests.data.test_kills_and_losses import tar_config
if __name__ == "__main__":
    tars, out, wanted, left = sys.argv[1:]
    left = int(left)
    spilled._IN_MEMORY_BYTES = 16
    def die(event, arguments):
        global left
        nameless = event == "open" and arguments[2] & os.O_TMPFILE == os.O_TMPFILE
        if (nameless or event == "os.rename") and str(arguments[0 if nameless else 1]).endswith(wanted):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    prepare(Path(out), tar_config(Path(tars)), seed=0)
"""


def tar_config(tars: Path, **values: Any) -> Any:
    source = {"kind": "webdataset", "urls": f"{tars}/*.tar"}
    more = {"filters": {"near_duplicate_bits": 3}, "max_rejected_fraction": 0.5, "validation_fraction": 0.2, **values}
    return prepare_config(source, **more)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Of each tar but the first, two images are copies of such in the tar before, and one has its key."""
    for tar in range(TARS):
        numbers = [*range(tar * EACH, (tar + 1) * EACH), *range(max(0, tar * EACH - 2), tar * EACH)]
        members: list[tuple[str, bytes]] = []
        for place, number in enumerate(numbers):
            key = f"{number:03d}" if place != EACH else f"{number:03d}-again"
            scene = image(number, (8, 8)).resize((48, 48), Image.Resampling.BICUBIC)
            members += [(f"{key}.png", encoded(scene)), (f"{key}.txt", f"image {number}".encode())]
        write_tar(tmp_path / "in" / f"{tar}.tar", members)
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("wanted", "which"),
    [
        pytest.param("/parts", 1, id="comparing keys"),
        pytest.param("/parts", 8, id="comparing images"),
        pytest.param("/train/000002.index.npy", 2, id="writing a part again, before its files"),
        pytest.param("/train/000002.tar", 2, id="writing a part again, before its tar"),
        pytest.param("/parts/000002.json", 2, id="writing a part again, before its record"),
    ],
)
def test_killed_while_parts_are_compared_or_written_again_it_ends_with_the_same_bytes_and_leaves_nothing(
    wanted: str, which: int, tars: Path, tmp_path: Path
) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, str(tmp_path / "dies.py"), str(tars), str(tmp_path / "out"), wanted, str(which)]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out/parts").glob("0*.json"))) == TARS, "killed too early to prove anything"
    assert not (tmp_path / "out/index.json").exists()
    index = prepare(tmp_path / "out", tar_config(tars), seed=0)
    assert index["rejected"]["reasons"] == {"duplicate key": TARS - 1, "near-duplicate": TARS - 1}
    prepare(tmp_path / "undisturbed", tar_config(tars), seed=0)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "undisturbed")


away: list[tuple[Path, Path]] = []  # what goes where as soon as the first part is finished


def _take_away(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and away and str(arguments[1]).endswith("parts/000000.json"):
        here, there = away.pop()
        here.rename(there)


@pytest.mark.parametrize("storage", ["png", "in-place"])
def test_a_source_that_goes_away_halfway_stops_prepare_and_once_it_is_back_the_bytes_are_the_same(
    storage: str, tars: Path, tmp_path: Path
) -> None:
    config = tar_config(tars, storage=storage)
    sys.addaudithook(_take_away)
    away.append((tars, tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"the source failed at .*1\.tar"):
        prepare(tmp_path / "out", config, seed=0)
    assert [path.name for path in (tmp_path / "out/parts").glob("*.json")] == ["000000.json"]
    assert not (tmp_path / "out/index.json").exists()
    (tmp_path / "elsewhere").rename(tars)
    prepare(tmp_path / "out", config, seed=0)
    prepare(tmp_path / "undisturbed", config, seed=0)
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "undisturbed")
