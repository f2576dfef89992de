"""Images of [height, width]: every stage keeps their shape, top and bottom are not left and right."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.base import parse_config
from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import load_pipeline
from pipeline.config.prepare import PrepareConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core.errors import UserError
from pipeline.data.augment import Augment
from pipeline.data.images import cropped
from pipeline.data.inspect import inspect_directory
from pipeline.data.prepare import prepare
from pipeline.data.shards import read_samples
from pipeline.data.stream import ImageStream
from pipeline.data.tokens import TokenArrays
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.reranker.model import TwoTowers
from pipeline.reranker.ranker import Ranker
from pipeline.sampling.grid import Group, Tile, grid
from pipeline.sampling.image_prompt import ImagePrompt, extended, known_codes
from pipeline.sampling.pipeline import Pipeline
from pipeline.serving.asked import Asked
from pipeline.serving.refusal import Refusal
from pipeline.serving.uploads import upload
from pipeline.text_tokenizer import TextTokenizer
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from tests.conftest import TINY
from tests.data.sample_images import encoded, image, prepare_config, write_folder, write_tar
from tests.data.small_run import make_small_run

SIZE = (16, 24)  # height, width


def _config(source: dict[str, Any], **values: Any) -> PrepareConfig:
    values = {"image_size": list(SIZE), "validation_fraction": 0.2, "shard_size": 8, **values}
    return prepare_config(source, **values)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Up to tokenize, with two crops of an image."""
    directory = tmp_path_factory.mktemp("rectangles")
    config = _config({"kind": "folder", "path": str(write_folder(directory / "in", 24))})
    return make_small_run(directory, 0, TokenizeConfig(batch_size=8, crops=2), prepare_config=config)


@pytest.mark.parametrize(("whole", "box"), [((60, 20), (15, 0, 45, 20)), ((30, 40), (0, 10, 30, 30))])
def test_the_largest_part_of_that_shape_is_kept_and_resized_once(
    whole: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    found = cropped(image(1, whole), SIZE)
    assert found.size == SIZE[::-1]
    assert found.tobytes() == image(1, whole).resize(SIZE[::-1], Image.Resampling.LANCZOS, box=box).tobytes()
    upright = image(2, SIZE[::-1])
    assert cropped(upright, SIZE) is upright


@pytest.mark.parametrize("crop", ["center", "random"])
def test_in_place_shows_what_png_stores(tmp_path: Path, crop: str) -> None:
    members = []
    for number, whole in enumerate([(70, 40), (40, 70), (48, 32), (110, 50)]):
        members.append((f"{number}.jpg", encoded(image(number, whole), "JPEG", quality=95)))
        members.append((f"{number}.txt", b"an image"))
    write_tar(tmp_path / "in/0.tar", members)
    seen = []
    for storage in ("png", "in-place"):
        values: dict[str, Any] = {"storage": storage, "crop": crop, "validation_fraction": 0, "image_size": [32, 48]}
        source = {"kind": "webdataset", "urls": f"{tmp_path}/in/*.tar"}
        prepare(tmp_path / storage, prepare_config(source, **values), seed=0)
        stream = ImageStream(tmp_path / storage, "train", 0, cache_bytes=0)
        seen.append(next(stream.batches(0, 4))["images"])
        assert seen[-1].shape == (4, 3, 32, 48)
    assert torch.equal(*seen)


def test_shards_tokens_and_grids_have_the_shape(run: Path) -> None:
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer/model")
    assert [(level.height, level.width) for level in tokenizer.levels] == [(8, 12)]
    arrays = TokenArrays(run / "tokenize", "train")
    assert arrays.levels == tokenizer.levels
    samples = list(read_samples(run / "prepare", "train"))
    assert {sample.image.size for sample in samples} == {SIZE[::-1]}
    pixels = torch.from_numpy(np.stack([np.asarray(sample.image) for sample in samples])).permute(0, 3, 1, 2)
    (codes,) = tokenizer.encode(pixels.float() / 255)
    assert np.array_equal(codes.numpy(), arrays.gather(np.arange(len(arrays)), np.zeros(len(arrays), np.int64))[1])
    assert tokenizer.decode([codes]).shape == (len(samples), 3, *SIZE)
    assert f"images of {SIZE[0]}×{SIZE[1]} (height × width)" in "\n".join(
        inspect_directory(run / "prepare", None, verify=True)
    )
    with pytest.raises(UserError, match=r"takes images of 16×24 \(height × width\)"):
        tokenizer.encode(torch.zeros(1, 3, *SIZE[::-1]))


def test_finer_grids_and_the_rerankers_patches_have_the_shape(tmp_path: Path) -> None:
    quantizer = {"kind": "ema", "codebook_size": 16, "code_width": 4}
    model = {"kind": "vqvae2", "quantizers": [quantizer] * 2, "patch_size": 2, "widths": [8, 8], "blocks": 1}
    tokenizer = build(model, SIZE).eval()
    assert [(level.height, level.width) for level in tokenizer.levels] == [(4, 6), (8, 12)]
    codes = tokenizer.encode(torch.rand(2, 3, *SIZE))
    assert [level.shape for level in codes] == [(2, 24), (2, 96)]
    assert tokenizer.decode(codes).shape == (2, 3, *SIZE)
    tiled = build(model | {"tile_size": 8}, SIZE).eval()
    tiled.load_state_dict(tokenizer.state_dict())
    assert all(
        torch.equal(*pair)
        for pair in zip(tiled.encode(torch.ones(1, 3, *SIZE)), tokenizer.encode(torch.ones(1, 3, *SIZE)), strict=True)
    )
    torch.testing.assert_close(tiled.decode(codes), tokenizer.decode(codes))
    tokenizer.save_pretrained(tmp_path)
    assert ImageTokenizer.from_pretrained(tmp_path).image_size == SIZE
    towers = TwoTowers(load_pipeline(TINY).reranker.model, SIZE, 8, 300).eval()
    towers.save_pretrained(tmp_path / "towers")
    loaded = TwoTowers.from_pretrained(tmp_path / "towers")
    assert loaded.embed_images(torch.rand(2, 3, *SIZE)).shape[0] == 2
    assert loaded.image_size == SIZE


@pytest.fixture(scope="module")
def pipelines(run: Path) -> dict[str, Pipeline]:
    """Untrained transformers over the run's grid, by order."""
    tokenizer = ImageTokenizer.from_pretrained(run / "image-tokenizer/model")
    text = TextTokenizer.from_pretrained(run / "text-tokenizer")
    layout = Layout.of(text.text_length, text.vocab_size, tokenizer.levels)
    made = {}
    for order in ("raster", "any"):
        torch.manual_seed(0)
        values = {"layers": 4, "width": 32, "heads": 2, "order": order}
        if order == "raster":
            values |= {"attention": "sparse", "conv_kernel": 3}  # rows, columns and squares around a code
        shape = TransformerShape.model_validate(values)
        made[order] = Pipeline(text, build_transformer(layout, shape).eval(), tokenizer)
    return made


@pytest.mark.parametrize("order", ["raster", "any"])
def test_images_are_generated_completed_and_filled_in_the_shape(pipelines: dict[str, Pipeline], order: str) -> None:
    pipeline = pipelines[order]
    sampling = SamplingConfig.model_validate({"passes": 6} if order == "any" else {})
    first = pipeline.generate(["image number 1"], seed=1, sampling=sampling)[0].image
    assert first.size == SIZE[::-1]
    mask = Image.new("L", SIZE[::-1], 0)
    mask.paste(255, (18, 2, 24, 6))  # right and top: a code is 2 by 2 pixels
    codes = known_codes(pipeline.image_tokenizer, ImagePrompt(first, mask=mask), torch.device("cpu")).view(8, 12)
    assert ((codes == -1).nonzero() == torch.cartesian_prod(torch.arange(1, 3), torch.arange(9, 12))).all()
    rows = known_codes(pipeline.image_tokenizer, ImagePrompt(first, keep_rows=7), torch.device("cpu")).view(8, 12)
    assert ((rows != -1).all(1) == (torch.arange(8) < 7)).all()
    for prompt in (ImagePrompt(first, keep_rows=7), extended(first, {"left": 4})):
        made = pipeline.generate(["image number 1"], seed=2, sampling=sampling, image_prompt=prompt)[0]
        assert made.image.size == SIZE[::-1]
    with pytest.raises(UserError, match="expected an image of 24×16 pixels, found 16×24"):
        known_codes(pipeline.image_tokenizer, ImagePrompt(image(1, SIZE), keep_rows=1), torch.device("cpu"))


def test_a_ranker_and_a_client_get_the_shape(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["raster"]
    towers = TwoTowers(load_pipeline(TINY).reranker.model, SIZE, pipeline.text_tokenizer.text_length, 300).eval()
    assert len(Ranker(towers, pipeline.text_tokenizer).embed_images([image(1, (9, 9)), image(2, (24, 16))])) == 2
    assert upload(encoded(image(3, (50, 50))), "image", SIZE).size == SIZE[::-1]
    Asked(prompt="image number 1", size="24x16").sampling_for(pipeline, "model", 4)
    with pytest.raises(Refusal, match="size: expected 24x16 or auto"):
        Asked(prompt="image number 1", size="16x24").sampling_for(pipeline, "model", 4)


def test_captions_on_a_sheet_are_below_tall_images() -> None:
    tall = grid([Group("", [Tile(Image.new("RGB", (16, 48), "red"), "a caption")])], columns=1, side=96)
    flat = grid([Group("", [Tile(Image.new("RGB", (16, 16), "red"), "a caption")])], columns=1, side=96)
    assert tall.height - flat.height == 2 * 96
    red = (np.asarray(tall) == (255, 0, 0)).all(-1)
    assert red.sum() == 96 * 288  # no letter is on the image


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "prepare.image_size=[16, 18]",
            "expected multiples of 4, as the image tokenizer .* found [16, 18]: set image_size=16",
        ),
        ("prepare.image_size=[16]", "expected pixels, 8 to 2048, or [height, width] of such, found [16]"),
        ("prepare.image_size=[4, 16]", "expected pixels, 8 to 2048, or [height, width] of such, found [4, 16]"),
        ("prepare.image_size=2049", "expected pixels, 8 to 2048, or [height, width] of such, found 2049"),
        ("prepare.source={kind: shapes, samples: 9}", "scenes of source shapes are square, found [16, 32]"),
    ],
)
def test_a_size_that_does_not_fit_is_told_in_one_line(override: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load_pipeline(TINY, ["prepare.image_size=[16, 32]", override])
    first, _, rest = told.partition(" .* ")
    assert first in str(error.value)
    assert rest in str(error.value)


def test_a_square_of_two_numbers_is_the_square_of_one() -> None:
    values = {"source": {"kind": "folder", "path": "photos"}}
    assert parse_config(PrepareConfig, values | {"image_size": [16, 16]}, "a").image_size == 16
    assert parse_config(PrepareConfig, values | {"image_size": [16, 24]}, "a").image_size == SIZE


def test_augmentation_is_off_by_default_and_a_function_of_seed_epoch_and_sample(run: Path) -> None:
    def taken(augment: Augment | None, begin: int, batches: int, seed: int = 3, **ranks: int) -> list[bytes]:
        stream = ImageStream(run / "prepare", "train", seed, augment=augment, **ranks)
        return [row.numpy().tobytes() for b in islice(stream.batches(begin, 8), batches) for row in b["images"]]

    section = load_pipeline(TINY).image_tokenizer
    assert not Augment(section.random_flip, section.random_crop).is_on
    both = Augment(flip=True, min_scale=0.7)
    plain, alone = taken(None, 0, 12), taken(both, 0, 12)
    assert taken(Augment(False, 1.0), 0, 12) == plain
    assert taken(both, 40, 7) == alone[40:]  # resumed anywhere
    halves = [taken(both, 0, 12, rank=rank, world_size=2) for rank in (0, 1)]
    assert [row for step in range(12) for half in halves for row in half[4 * step : 4 * step + 4]] == alone
    assert len({*alone}) > len({*plain})  # each epoch has others
    mirrored = taken(Augment(flip=True, min_scale=1.0), 0, 12)
    for before, after in zip(plain, mirrored, strict=True):
        original = np.frombuffer(before, np.uint8).reshape(3, *SIZE)
        assert after in (before, original[:, :, ::-1].tobytes())
    assert 0.3 < np.mean([before != after for before, after in zip(plain, mirrored, strict=True)]) < 0.7


def test_an_emoji_is_in_the_middle_of_its_rectangle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    values: dict[str, Any] = {"kind": "openmoji", "limit": 2}
    prepare(tmp_path / "wide", prepare_config(values, image_size=[16, 32], validation_fraction=0), seed=0)
    prepare(tmp_path / "square", prepare_config(values, image_size=16, validation_fraction=0), seed=0)
    wide, square = (list(read_samples(tmp_path / name, "train")) for name in ("wide", "square"))
    assert wide[0].image.crop((8, 0, 24, 16)).tobytes() == square[0].image.tobytes()
    assert (np.asarray(wide[0].image)[:, [*range(8), *range(24, 32)]] == 255).all()
