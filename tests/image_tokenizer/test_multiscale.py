"""Promises of the multi-scale quantizer; through every stage its levels go in test_levels.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.base import parse_config
from pipeline.config.image_tokenizer_model import VQVAEConfig
from pipeline.core.errors import UserError
from pipeline.core.resize import resize_matrix
from pipeline.image_tokenizer.base import build
from pipeline.image_tokenizer.quantizers import build_quantizer
from pipeline.image_tokenizer.quantizers.multiscale import MultiscaleQuantizer
from pipeline.sampling.image_prompt import _any_within

SCALES = (1, 2, 3, 4, 6, 8)


def model(**changes: Any) -> dict[str, Any]:
    book = {"kind": "ema", "codebook_size": 64, "code_width": 8}
    quantizer = {"kind": "multiscale", "scales": SCALES, "codebook": book, **changes}
    shape = {"patch_size": 2, "widths": [32], "blocks": 1, "block_kernels": [3, 1]}
    return {"kind": "vqvae", **shape, "quantizer": quantizer}


def quantizer(**changes: Any) -> MultiscaleQuantizer:
    config = parse_config(VQVAEConfig, model(**changes), "test").quantizer
    torch.manual_seed(0)
    made = build_quantizer(config, 16, 12)
    assert isinstance(made, MultiscaleQuantizer)
    return made.train()


def features(seed: int, images: int = 8) -> Tensor:
    """[images,64,16]: each image has a mean of its own, as those of an encoder have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 64, 16, generator=generator) + 2 * torch.randn(images, 1, 16, generator=generator) + 5


def learned(steps: int = 20, parts: int = 1, **changes: Any) -> MultiscaleQuantizer:
    made = quantizer(**changes)
    for step in range(steps):
        torch.manual_seed(step)
        for part in features(step).chunk(parts):
            made(part, step)
        made.after_update(applied=True)
    return made


def test_resizing_is_torchs_own() -> None:
    x = torch.randn(2, 3, 8, 8)
    for side in SCALES:
        down, up = resize_matrix(8, side, "area"), resize_matrix(side, 8, "bicubic")
        coarse = F.interpolate(x, (side, side), mode="area")
        torch.testing.assert_close(down @ x @ down.T, coarse)
        torch.testing.assert_close(up @ coarse @ up.T, F.interpolate(coarse, (8, 8), mode="bicubic"))


def test_each_grid_brings_the_sum_nearer() -> None:
    made, x = learned().eval(), features(99)
    codes = made.encode(x)
    z = made._project(x)
    sums: list[Tensor] = []
    made._sum_of_grids(lambda grid, _: made._looked_up(grid, codes[grid]), None, sums.append)
    errors = [float((z - each).detach().square().mean()) for each in sums]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


def test_every_scale_uses_the_one_codebook() -> None:
    """Images' means lie far from zero and near each other: without standardising, the first grid has few codes."""
    made = learned().eval()
    codes = made.encode(torch.cat([features(seed, 64) for seed in range(8)]))
    assert min(len(code.unique()) for code in codes) >= 32


@pytest.mark.parametrize("per_scale", [False, True])
def test_into_how_many_micro_batches_a_step_is_cut_changes_nothing(per_scale: bool) -> None:
    whole, parts = learned(3, codebook_per_scale=per_scale), learned(3, parts=4, codebook_per_scale=per_scale)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)


def test_with_a_codebook_per_scale_each_is_its_grids_own() -> None:
    """Images lie along a line at 1×1, where codes of finer grids, which lie everywhere, are of no use."""
    line = torch.linspace(-1, 1, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    x = features(0, 512) + 20 * line[:, None, None] * torch.ones(16)
    used = []
    for per_scale in (False, True):
        made = quantizer(codebook_per_scale=per_scale)
        for step, part in enumerate(x.split(16) * 4):
            torch.manual_seed(step)
            made(part, step)
            made.after_update(applied=True)
        codes = made.eval().encode(x)
        made_of = made.vectors(codes)
        used.append(len(codes[0].unique()))
    assert used[1] > 1.5 * used[0]
    books = dict(made.named_buffers())
    assert not torch.equal(books["codebooks.0.embedding"], books["codebooks.1.embedding"])
    assert made.codebook_sizes == [64] * len(SCALES)
    assert made_of.shape == (512, 64, 8)


def test_a_skipped_update_changes_nothing() -> None:
    made = learned(2)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    for applied in (False, torch.tensor(False)):
        made(features(0) * torch.nan, 2)
        made.after_update(applied)
        torch.testing.assert_close(made.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": [1, 2, 4]}, "expected the last of scales to be 8.*, found 4: change scales"),
        ({"scales": [2, 1, 8]}, r"none smaller than the one before; found \[2, 1, 8\]"),
        ({"codebook": {"kind": "ema", "depth": 2}}, "codebook.depth is not for multiscale"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(model(**changes), 16)
    assert "\n" not in str(caught.value)


def test_a_mask_covers_every_code_that_has_a_generated_pixel() -> None:
    level = build(model(), 16).levels[2]
    assert (level.height, level.width) == (3, 3)
    generated = torch.zeros(16, 16, dtype=torch.bool)
    generated[5, 15] = True  # in rows 0 .. 5 and in 5 .. 10
    assert _any_within(generated.numpy(), level).nonzero()[0].tolist() == [0, 1]
    assert _any_within(generated.numpy(), level).nonzero()[1].tolist() == [2, 2]
