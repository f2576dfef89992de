from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from pipeline.core import signals
from pipeline.core.errors import StoppedOnRequest
from pipeline.data import duplicates, spilled
from pipeline.data.duplicates import same_image, same_key
from pipeline.data.images import perceptual_hash
from tests.data.sample_images import encoded, image


def _files(folder: Path, hashes: NDArray[np.uint64], size: int) -> tuple[list[Path], list[int]]:
    """`hashes` uint64 [n, 2] as files of `size` samples."""
    files, counts = [], []
    for start in range(0, len(hashes), size):
        files.append(folder / f"{start}.npy")
        np.save(files[-1], hashes[start : start + size])
        counts.append(len(hashes[start : start + size]))
    return files, counts


def _random(count: int, seed: int) -> NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), dtype=np.uint64)


@pytest.mark.parametrize("samples_per_slice", [10, 100, 10_000])
def test_repeated_keys_are_found_at_any_number_of_slices_and_pieces(
    tmp_path: Path, samples_per_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled, "PIECE", 30)
    hashes = _random(500, 0)
    again = np.random.default_rng(1).choice(np.arange(250, 500), 40, replace=False)
    hashes[again, 0] = hashes[again - 250, 0]
    files, counts = _files(tmp_path, hashes, 70)
    assert np.flatnonzero(same_key(files, counts, samples_per_slice)).tolist() == sorted(again.tolist())


def test_the_first_of_several_equal_keys_is_kept(tmp_path: Path) -> None:
    hashes = _random(9, 0)
    hashes[[1, 4, 8], 0] = 7
    files, counts = _files(tmp_path, hashes, 2)
    assert np.flatnonzero(same_key(files, counts)).tolist() == [4, 8]


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
def test_near_hashes_are_exactly_those_that_comparing_all_pairs_finds(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(bits)
    hashes = _random(30, 2)[:, [0, 0]][rng.integers(0, 30, 600)]
    for _ in range(4):  # up to four flipped bits each
        flipped = rng.random(600) < 0.4
        hashes[flipped, 1] ^= np.uint64(1) << rng.integers(0, 64, flipped.sum()).astype(np.uint64)
    without = np.isin(np.arange(600), [3, 50, 51])
    files, _ = _files(tmp_path, hashes, 100)
    looked_at = np.flatnonzero(~without).tolist()
    expected = [
        n for n in looked_at if any(int(hashes[n, 1] ^ hashes[m, 1]).bit_count() <= bits for m in looked_at if m < n)
    ]
    assert 10 < len(expected) < 590
    assert np.flatnonzero(same_image(files, bits, without)).tolist() == expected


def _brute_force(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
    """Which differ in at most `bits` bits from one before them."""
    near = np.zeros(len(hashes), bool)
    for number in range(1, len(hashes)):
        near[number] = (np.bitwise_count(hashes[:number] ^ hashes[number]) <= bits).any()
    return near


@pytest.mark.parametrize(("bits", "group"), [(1, 32), (3, 32), (4, 256)])
@pytest.mark.parametrize("per_slice", [1 << 21, 700, 100])
def test_hashes_that_agree_in_most_bits_are_compared_in_groups_and_slices_of_bounded_size(
    bits: int, group: int, per_slice: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_GROUP", group)
    monkeypatch.setattr(spilled, "PIECE", 1_000)  # so that a slice comes from several pieces
    monkeypatch.setattr(spilled, "_IN_MEMORY_BYTES", 1 << 14)  # and all of it from files
    compared: list[int] = []
    mark = duplicates._mark

    def counted(hashes: NDArray[np.uint64], *more: Any) -> None:
        compared.append(len(hashes))
        mark(hashes, *more)

    monkeypatch.setattr(duplicates, "_mark", counted)
    rng = np.random.default_rng(bits)
    flat = rng.integers(0, 1 << 12, 4_000, np.uint64) << np.uint64(30)  # 52 bits are the same in all of them
    flat &= ~np.where(flat >> np.uint64(41), np.uint64(7 << 30), np.uint64(0))  # and 55 in half of them
    drawings = rng.integers(0, 1 << 24, 1_500, np.uint64) * np.uint64(0x10_0001) & np.uint64(0x00FF_00FF_00FF_0000)
    photographs = rng.integers(0, 1 << 64, 500, np.uint64)
    copies = photographs[:200] ^ (np.uint64(1) << rng.integers(0, 64, 200, np.uint64))
    hashes = rng.permutation(np.concatenate([flat, drawings, photographs, copies]))  # some come many times
    expected = _brute_force(hashes, bits)
    assert 150 < expected.sum() < len(hashes) - 150
    files, _ = _files(tmp_path, np.stack([hashes, hashes], axis=1), 900)
    assert np.array_equal(same_image(files, bits, np.zeros(len(hashes), bool), per_slice), expected)
    assert max(compared) <= 2 * max(per_slice, group)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files)


def test_a_stop_is_looked_at_while_images_are_compared_and_leaves_nothing_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, counts = _files(tmp_path, _random(1_000, 3), 300)
    looked: list[bool] = []

    def stop_at_the_twentieth() -> None:
        looked.append(True)
        if len(looked) == 20:
            raise StoppedOnRequest("asked to")

    monkeypatch.setattr(spilled, "_IN_MEMORY_BYTES", 1 << 10)
    monkeypatch.setattr(signals, "check", stop_at_the_twentieth)
    with pytest.raises(StoppedOnRequest):
        same_image(files, 3, np.zeros(sum(counts), bool))
    assert sorted(tmp_path.iterdir()) == sorted(files)


def _scene(number: int, side: int = 96) -> Image.Image:
    """A smooth image, different for every number."""
    return image(number, (8, 8)).resize((side, side), Image.Resampling.BICUBIC)


def _distance(one: Image.Image, two: Image.Image) -> int:
    return (perceptual_hash(one) ^ perceptual_hash(two)).bit_count()


def test_copies_of_an_image_are_near_and_other_images_are_far(tmp_path: Path) -> None:
    close, far = [], []
    for number in range(40):
        scene = _scene(number)
        path = tmp_path / "copy.jpg"
        path.write_bytes(encoded(scene, "JPEG", quality=60))
        close += [
            _distance(scene, Image.open(path)),
            _distance(scene, scene.resize((48, 48), Image.Resampling.LANCZOS)),
        ]
        far.append(min(_distance(scene, _scene(other)) for other in range(number)) if number else 64)
    assert np.quantile(close, 0.95) <= 3
    assert min(far) > 8


def test_the_same_drawing_in_another_colour_is_another_image() -> None:
    heart = Image.new("RGB", (64, 64), "white")
    heart.paste((230, 30, 40), (12, 12, 52, 52))
    for colour in ((60, 170, 60), (40, 90, 220), (150, 60, 190), (245, 210, 40)):
        other = Image.new("RGB", (64, 64), "white")
        other.paste(colour, (12, 12, 52, 52))
        assert _distance(heart, other) > 3
    assert _distance(heart, ImageEnhance.Brightness(heart).enhance(0.98)) <= 3
