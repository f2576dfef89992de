"""Promises of `prepare.storage: in-place`: the user's tars are read where they are, by an index, and never copied."""

from __future__ import annotations

import gzip
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from pipeline.config.prepare import PrepareConfig
from pipeline.config.store import StoreConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.data.catalog import Catalog
from pipeline.data.inspect import inspect_directory
from pipeline.data.prepare import prepare
from pipeline.data.remote_file import configure
from pipeline.data.shards import read_index
from pipeline.data.stream import ImageStream
from pipeline.data.token_parts import token_parts
from pipeline.data.tokenize_shards import tokenize_shards
from pipeline.data.tokens import TokenArrays
from pipeline.evaluation.image_sets import prepared_images
from tests.data.s3 import s3_server
from tests.data.sample_images import encoded, folder_config, image, prepare_config, tree_bytes, write_tar
from tests.data.small_run import make_small_run, tokenize_job
from tests.launch import environment

SIDE = 16  # of what is kept: below half of every image, so that the whole is decoded, as for png


def _members(numbers: range) -> list[tuple[str, bytes]]:
    members = []
    for number in numbers:
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        turned = Image.Exif()
        turned[0x0112] = 6
        about: dict[str, Any] = {"exif": turned} if kind == "JPEG" and number % 2 else {}
        content = encoded(image(number, (30, 22)), kind, **about)
        members.append((f"{number:05d}.{kind.lower()}", content))
        members.append((f"{number:05d}.json", b'{"score": %d}' % number))
        members.append((f"{number:05d}.txt", f"image number {number}".encode()))
    return members


def _config(folder: Path | str, storage: str = "in-place", **values: Any) -> PrepareConfig:
    values = {"image_size": SIDE, "validation_fraction": 0.2, "crop": "random", **values}
    return prepare_config({"kind": "webdataset", "urls": f"{folder}/*.tar"}, storage=storage, **values)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of 10 images, the last with one that is cut short. Look, do not write."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(3):
        members = _members(range(10 * number, 10 * number + 10))
        if number == 2:
            members += [("broken.jpeg", members[0][1][:300]), ("broken.txt", b"x")]
        write_tar(folder / f"{number}.tar", members)
    return folder


@pytest.fixture(scope="module")
def prepared(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both of `png` and of `in-place`. Look, do not write."""
    folder = tmp_path_factory.mktemp("prepared")
    for storage in ("png", "in-place"):
        prepare(folder / storage, _config(tars, storage), seed=0)
    return folder


@pytest.fixture
def own(tars: Path, tmp_path: Path) -> Path:
    """Tars to be written to, and in out/ what is prepared of them."""
    shutil.copytree(tars, tmp_path / "in")
    prepare(tmp_path / "out", _config(tmp_path / "in"), seed=0)
    return tmp_path


def test_everything_reads_from_the_users_tars_what_a_copy_would_hold_and_nothing_is_copied(prepared: Path) -> None:
    copied, placed = prepared / "png", prepared / "in-place"
    assert not list(placed.glob("*/*.tar"))
    assert read_index(copied)["rejected"] == read_index(placed)["rejected"]
    assert read_index(copied)["conversions"] == read_index(placed)["conversions"]
    for split in ("train", "val"):
        one, other = Catalog(copied, split), Catalog(placed, split)
        every = range(len(one))
        assert len(one) == len(other) > 2
        assert one.keys(every) == other.keys(every)
        assert np.array_equal(one.number("score", every), other.number("score", every))
        pairs = zip(one.samples(every), other.samples(every), strict=True)
        for copy, place in pairs:
            assert (copy.key, copy.captions) == (place.key, place.captions)
            assert np.array_equal(np.asarray(copy.image), np.asarray(place.image))
        sets = (prepared_images(one, every), prepared_images(other, every))
        for copied_image, placed_image in zip(*sets, strict=True):
            assert np.array_equal(np.asarray(copied_image.image), np.asarray(placed_image.image))
            assert placed_image.size(placed_image.content()) == (SIDE, SIDE)
        batches = [next(ImageStream(d, split, seed=3).batches(0, len(one)))["images"] for d in (copied, placed)]
        assert batches[0].equal(batches[1])
    assert "every shard is, byte for byte" in "\n".join(inspect_directory(placed, None, verify=True))


def test_tokenize_makes_of_images_in_place_what_it_makes_of_copies(tars: Path, tmp_path: Path) -> None:
    found = []
    for storage in ("png", "in-place"):
        config = _config(tars, storage)
        run = make_small_run(tmp_path / storage, 0, TokenizeConfig(crops=2), prepare_config=config)
        arrays = TokenArrays(run / "tokenize", "train")
        every = np.arange(len(arrays))
        found.append((arrays.gather(every, every % 2), arrays.captions(every)))
    assert np.array_equal(found[0][0][0], found[1][0][0])
    assert np.array_equal(found[0][0][1], found[1][0][1])
    assert found[0][1] == found[1][1]


def test_large_jpegs_are_decoded_in_part_and_cut_where_a_copy_is(tmp_path: Path) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    large = small.resize((301, 223), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 8
    contents = [encoded(large, "JPEG"), encoded(large, "JPEG", exif=turned), encoded(large)]
    members = [(f"{n}.{e}", c) for n, content in enumerate(contents) for e, c in (("jpg", content), ("txt", b"x"))]
    write_tar(tmp_path / "in/0.tar", members)
    images = {}
    for storage in ("png", "in-place"):
        prepare(tmp_path / storage, _config(tmp_path / "in", storage, image_size=32, validation_fraction=0), seed=0)
        images[storage] = [np.asarray(s.image, float) for s in Catalog(tmp_path / storage, "train").samples(range(3))]
    for copy, place in zip(*images.values(), strict=True):
        assert ((copy - place) ** 2).mean() < 4  # 42 dB


@pytest.mark.parametrize("change", ["bytes", "size", "gone"])
def test_a_tar_replaced_by_another_of_its_name_is_told_by_whoever_reads_it_and_prepared_again(
    change: str, own: Path
) -> None:
    tar, config = own / "in/1.tar", _config(own / "in")
    before = tree_bytes(own / "out")
    if change == "gone":
        tar.unlink()
    else:
        size = tar.stat().st_size
        write_tar(tar, _members(range(40, 50 if change == "bytes" else 54)))
        assert (tar.stat().st_size == size) == (change == "bytes")
    with pytest.raises(UserError, match=r"in/1\.tar is (another file than prepare read|damaged at sample|missing)"):
        list(Catalog(own / "out", "train").samples(range(20)))
    with pytest.raises(UserError, match=r"in/1\.tar is (another file than prepare read|damaged at sample|missing)"):
        next(ImageStream(own / "out", "train", seed=0).batches(0, 16))
    with pytest.raises(UserError, match=r"in/1\.tar is (another file than prepare read|damaged at sample|missing)"):
        list(inspect_directory(own / "out", None, verify=True))
    prepare(own / "out", config, seed=0)
    prepare(own / "fresh", config, seed=0)
    assert tree_bytes(own / "out") == tree_bytes(own / "fresh") != before


def test_one_flipped_byte_of_the_index_or_of_an_image_is_told_before_it_is_tokenized(
    tars: Path, tmp_path: Path
) -> None:
    shutil.copytree(tars, tmp_path / "in")
    run = make_small_run(tmp_path, 0, None, prepare_config=_config(tmp_path / "in"))
    job = tokenize_job(run, tmp_path / "tokens", TokenizeConfig())
    index = run / "prepare/train/000001.index.npy"
    for path, at, told in ((index, -20, "is not the index"), (tmp_path / "in/1.tar", 700, "is damaged at sample 0")):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=told):
            list(tokenize_shards(job, token_parts(job.prepare_dir)))
        path.write_bytes(content)
    assert any(list(tokenize_shards(job, token_parts(job.prepare_dir))))


def test_equal_keys_and_near_images_of_other_tars_are_left_out_as_of_copies(own: Path) -> None:
    write_tar(own / "in/3.tar", _members(range(8, 13)))
    kept = []
    for storage in ("png", "in-place"):
        values = {"filters": {"near_duplicate_bits": 0}, "max_rejected_fraction": 0.5}
        index = prepare(own / f"again-{storage}", _config(own / "in", storage, **values), seed=0)
        catalog = Catalog(own / f"again-{storage}", "train")
        kept.append((index["rejected"], catalog.keys(range(len(catalog)))))
    assert kept[0] == kept[1]
    assert kept[0][0]["reasons"]["duplicate key"] == 5


DIES = """
import os, signal, sys
from pathlib import Path
from pipeline.data.prepare import prepare
from pipeline.data.remote_file import configure
from tests.data.test_in_place import _config
if __name__ == "__main__":
    def die(event, arguments):
        if event == "os.rename" and str(arguments[1]).endswith("parts/000001.json"):
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    prepare(Path(sys.argv[2]), _config(Path(sys.argv[1])), seed=0)
"""


@pytest.mark.slow
def test_killed_in_a_part_it_resumes_and_ends_with_the_same_bytes(tars: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    command = [sys.executable, str(tmp_path / "dies.py"), str(tars), str(tmp_path / "out")]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out/parts").glob("*.json")] == ["000000.json"]
    prepare(tmp_path / "out", _config(tars), seed=0)
    assert tree_bytes(tmp_path / "out") == tree_bytes(prepared / "in-place")


@pytest.mark.parametrize("size", [(64, 2_048), (2_048, 64)])
def test_a_sheet_of_the_largest_images_is_small_enough_for_pillow_to_open(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    plain = encoded(Image.new("RGB", (8, 8)))
    write_tar(tmp_path / "in/0.tar", [m for n in range(13) for m in ((f"{n}.png", plain), (f"{n}.txt", b"a cat"))])
    prepare(tmp_path / "out", _config(tmp_path / "in", image_size=size, validation_fraction=0), seed=0)
    list(inspect_directory(tmp_path / "out", tmp_path / "sheet.png", verify=False))
    for sheet in (tmp_path / "out/contact-sheet.png", tmp_path / "sheet.png"):
        with Image.open(sheet, formats=["PNG"]) as opened:  # of which 12 rows are not more than 178 million pixels
            assert opened.width < 4_500
            assert opened.height < 2 * 400


def test_what_cannot_be_read_in_place_is_told_in_one_line(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(gzip.compress((tars / "0.tar").read_bytes()))
    with pytest.raises(UserError, match=r"expects images that lie in their tar as they are, found others in .*0\.tar"):
        prepare(tmp_path / "out", _config(tmp_path), seed=0)
    with pytest.raises(ValidationError, match="expected a source of kind webdataset, found folder"):
        folder_config(tmp_path, storage="in-place")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_server("tars") as files:
        yield files


@pytest.fixture
def there(tars: Path, bucket: Any, tmp_path: Path) -> Iterator[PrepareConfig]:
    """The same tars in an object store, and an empty cache."""
    bucket.put(str(tars), f"tars/{tmp_path.name}", recursive=True)
    configure(StoreConfig(cache=tmp_path / "cache"))
    yield _config(f"s3://tars/{tmp_path.name}")
    configure(StoreConfig.model_validate({}))


def test_tars_in_an_object_store_are_read_where_they_are(prepared: Path, there: PrepareConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(out, there, seed=0)
    assert read_index(out)["rejected"] == read_index(prepared / "in-place")["rejected"]
    for split in ("train", "val"):
        here, far = (Catalog(folder, split) for folder in (prepared / "in-place", out))
        every = range(len(here))
        assert far.keys(every) == here.keys(every)
        sets = (prepared_images(here, every), prepared_images(far, every))
        assert [image.content() for image in sets[0]] == [image.content() for image in sets[1]]
        batches = [next(ImageStream(d, split, seed=3).batches(0, 12))["images"] for d in (prepared / "in-place", out)]
        assert batches[0].equal(batches[1])
    assert "every shard is, byte for byte" in "\n".join(inspect_directory(out, None, verify=True))
    before = tree_bytes(out)
    prepare(out, there, seed=0)  # nothing to do, and no local file of that name is looked for
    assert tree_bytes(out) == before


def test_a_tar_in_an_object_store_that_was_replaced_is_told_and_prepared_again(
    there: PrepareConfig, bucket: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(out, there, seed=0)
    content = bytearray(bucket.cat_file(f"tars/{tmp_path.name}/1.tar"))
    begin = content.find(b"JFIF")
    content[begin + 200] ^= 1
    bucket.pipe_file(f"tars/{tmp_path.name}/1.tar", bytes(content))
    configure(StoreConfig(cache=tmp_path / "empty"))  # the other one has what prepare read
    with pytest.raises(UserError, match=r"s3://tars/.*/1\.tar is damaged at sample \d+: wrong checksum; run the stage"):
        list(inspect_directory(out, None, verify=True))
    prepare(out, there, seed=0)
    assert "every shard is, byte for byte" in "\n".join(inspect_directory(out, None, verify=True))
