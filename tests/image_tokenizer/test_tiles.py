"""Promises of encoding and decoding in tiles: what comes out is what the whole image gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.vqvae import VQVAE
from pipeline.training.live_memory import LiveBytes

SIZE = 64
BOOK = {"kind": "gradient", "codebook_size": 64, "code_width": 8}
SHAPE: dict[str, Any] = {"patch_size": 2, "widths": [8, 16], "blocks": 1, "block_kernels": [3, 3], "bottleneck": 1}
SHAPE |= {"reconstruction": "l2"}
MODELS: dict[str, dict[str, Any]] = {
    "dvae": {"kind": "dvae", **SHAPE, "codebook_size": 64, "code_width": 8, "reconstruction": "logit_laplace"},
    "vqvae": {"kind": "vqvae", **SHAPE, "quantizer": BOOK},
    "three blocks": {"kind": "vqvae", **SHAPE, "blocks": 3, "stem_kernel": 3, "quantizer": BOOK},
    "multiscale": {
        "kind": "vqvae",
        **SHAPE,
        "quantizer": {"kind": "multiscale", "scales": [1, 5, 16], "codebook": BOOK},
    },
    "vqvae2": {"kind": "vqvae2", **SHAPE, "quantizers": [BOOK, BOOK]},
    "color-form": {"kind": "color-form", **SHAPE, "color": BOOK, "form": BOOK},
    "openai-dvae": {"kind": "openai-dvae", "widths": [8, 16], "blocks": 1, "codebook_size": 64, "code_width": 8},
}


def tokenizer(name: str, tile_size: int | None, size: int = SIZE) -> ImageTokenizer:
    torch.manual_seed(0)
    return build({**MODELS[name], "tile_size": tile_size}, size).eval()


def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tile_size", [8, 24])
def test_tiles_give_the_codes_and_the_pixels_of_the_whole_image(name: str, tile_size: int) -> None:
    whole, tiled = tokenizer(name, None), tokenizer(name, tile_size)
    codes, expected = tiled.encode(images()), whole.encode(images())
    assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
    torch.testing.assert_close(tiled.decode(codes), whole.decode(codes), atol=2e-6, rtol=0)


def test_no_seam_lies_where_tiles_meet() -> None:
    """Decoded from one code everywhere, an image changes at its border alone: no column within is unlike another."""
    tiled = tokenizer("three blocks", 8)
    decoded = tiled.decode([torch.full((1, 16 * 16), 5)])
    inner = decoded[:, :, 24:-24, 24:-24].unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4))  # cells of 4 × 4, a code each
    torch.testing.assert_close(inner, inner[:, :, :1, :, :1].expand_as(inner), atol=2e-6, rtol=0)


def test_a_training_pass_is_in_one_piece() -> None:
    whole, tiled = tokenizer("vqvae", None).train(), tokenizer("vqvae", 8).train()
    assert isinstance(whole, VQVAE)
    assert isinstance(tiled, VQVAE)
    assert torch.equal(whole(images(), 0)[0], tiled(images(), 0)[0])


def test_tiles_take_less_memory() -> None:
    wide = {**MODELS["vqvae"], "patch_size": 1, "widths": [32, 16]}

    def peak(tile_size: int | None) -> int:
        made, live = build({**wide, "tile_size": tile_size}, 256).eval(), LiveBytes()
        with live:
            made.decode(made.encode(torch.zeros(1, 3, 256, 256)))
        return live.peak

    assert peak(64) < 0.4 * peak(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_size": 10}, "tile_size must be a multiple of 4, the pixels of a code's side; found 10"),
        ({"tile_size": 8, "block": "ode"}, "tile_size is for `block: residual`"),
    ],
)
def test_tiles_that_do_not_fit_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build({**MODELS["vqvae"], **changes}, SIZE)
    assert "\n" not in str(caught.value)
