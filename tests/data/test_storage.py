"""Promises of `prepare.storage`: every format is read alike by training, tokenize, evaluate and plain webdataset."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image

from pipeline.config.base import identity
from pipeline.config.prepare import PrepareConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.data.catalog import Catalog
from pipeline.data.prepare import prepare
from pipeline.data.shards import Sample, read_index, read_samples
from pipeline.data.stream import ImageStream
from pipeline.data.tokens import TokenArrays
from pipeline.evaluation.image_sets import prepared_images
from tests.data.sample_images import encoded, folder_config, tree_bytes
from tests.data.small_run import make_small_run

STORAGES = ("png", "webp", "jpeg")
SIDE = 32


def _smooth(number: int, size: tuple[int, int]) -> Image.Image:
    """Like a photograph: every frequency, and more of the low ones."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of 3 times the stored side and more, one that lies on its side, and PNGs with and without alpha."""
    folder = tmp_path_factory.mktemp("storage") / "in"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.jpg").write_bytes(encoded(_smooth(number, (120, 96)), "JPEG", quality=92))
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "20.jpg").write_bytes(encoded(_smooth(20, (96, 130)), "JPEG", exif=turned))
    (folder / "21.png").write_bytes(encoded(_smooth(21, (96, 96))))
    (folder / "22.png").write_bytes(encoded(_smooth(22, (96, 96)).convert("RGBA")))
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"image {path.stem}")
    return folder


def _config(folder: Path, storage: str, **values: object) -> PrepareConfig:
    return folder_config(folder, image_size=SIDE, shard_size=6, validation_fraction=0.2, storage=storage, **values)


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Path:
    """A folder of each storage. Look, do not write."""
    for storage in STORAGES:
        prepare(folder.parent / storage, _config(folder, storage), seed=0)
    return folder.parent


def _samples(directory: Path) -> list[Sample]:
    return [sample for split in ("train", "val") for sample in read_samples(directory, split)]


def _pixels(sample: Sample) -> NDArray[np.float64]:
    return np.asarray(sample.image, np.float64)


def test_webp_stores_the_pixels_of_png_and_jpeg_nearly_those(prepared: Path) -> None:
    exact, webp, jpeg = (_samples(prepared / storage) for storage in STORAGES)
    assert [s.key for s in exact] == [s.key for s in webp] == [s.key for s in jpeg]
    assert len(exact) == 15
    for one, same, near in zip(exact, webp, jpeg, strict=True):
        assert (one.caption, one.meta) == (same.caption, same.meta) == (near.caption, near.meta)
        assert np.array_equal(_pixels(one), _pixels(same))
        assert 0 < ((_pixels(one) - _pixels(near)) ** 2).mean() < 255**2 / 10**3.2  # 32 dB, noise of 4 levels and all
        assert [s.encoded[:3] for s in (one, same, near)] == [b"\x89PN", b"RIF", b"\xff\xd8\xff"]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(near.png), formats=["PNG"])), np.asarray(near.image))
    sizes = [read_index(prepared / storage)["splits"]["train"]["bytes"] for storage in STORAGES]
    assert sizes == sorted(sizes, reverse=True)
    assert [read_index(prepared / storage).get("storage") for storage in STORAGES] == [None, "webp", "jpeg"]


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_is_read_alike_by_training_catalog_evaluate_and_plain_webdataset(
    storage: str, prepared: Path
) -> None:
    directory = prepared / storage
    samples = {sample.key: sample for sample in read_samples(directory, "train")}
    expected = sorted(np.asarray(sample.image).transpose(2, 0, 1).tobytes() for sample in samples.values())
    batch = next(ImageStream(directory, "train", seed=0).batches(0, len(samples)))["images"]
    assert sorted(image.tobytes() for image in batch.cpu().numpy()) == expected
    catalog = Catalog(directory, "train")
    assert [sample.encoded for sample in catalog.samples(range(len(catalog)))] == [s.encoded for s in samples.values()]
    for stored in prepared_images(catalog, range(len(catalog))):
        assert np.array_equal(np.asarray(stored.image), np.asarray(samples[stored.key].image))
    extension = {"png": "png", "webp": "webp", "jpeg": "jpg"}[storage]
    tars = [str(path) for path in sorted((directory / "train").glob("*.tar"))]
    plain = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert {one["__key__"]: one[extension].tobytes() for one in plain} == {
        key: np.asarray(sample.image).tobytes() for key, sample in samples.items()
    }


def test_another_storage_or_quality_makes_the_shards_anew_with_the_bytes_of_a_fresh_prepare(
    folder: Path, prepared: Path, tmp_path: Path
) -> None:
    for config in (_config(folder, "png"), _config(folder, "jpeg", jpeg_quality=60), _config(folder, "jpeg")):
        prepare(tmp_path, config, seed=0)
    assert tree_bytes(tmp_path) == tree_bytes(prepared / "jpeg")


def test_arrays_of_webp_are_those_of_png_and_jpeg_is_tokenized_too(folder: Path, tmp_path: Path) -> None:
    made = {}
    for storage in STORAGES:
        values = {"image_size": 16, "shard_size": 6, "validation_fraction": 0.2}
        config = folder_config(folder, storage=storage, **values)
        make_small_run(tmp_path / storage, 0, TokenizeConfig(crops=2), prepare_config=config)
        arrays = TokenArrays(tmp_path / storage / "tokenize", "train")
        every = np.arange(len(arrays))
        made[storage] = arrays.gather(every, every % 2)
    for png, webp, jpeg in zip(*made.values(), strict=True):
        assert np.array_equal(png, webp)
        assert png.shape == jpeg.shape


def test_a_damaged_jpeg_shard_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    prepare(tmp_path, _config(folder, "jpeg"), seed=0)
    (tar, begin, size) = Catalog(tmp_path, "train").image_slices([0])[0]
    content = bytearray(tar.read_bytes())
    content[begin + size // 2] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"tar is damaged at sample 0: wrong checksum"):
        next(ImageStream(tmp_path, "train", seed=0).batches(0, 12))


def test_a_quality_without_jpeg_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="jpeg_quality is of storage: jpeg, found storage: webp"):
        _config(folder, "webp", jpeg_quality=80)
    assert identity(_config(folder, "png")).keys().isdisjoint({"storage", "jpeg_quality"}), "old shards stay up to date"
