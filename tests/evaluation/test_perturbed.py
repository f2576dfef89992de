"""pFID: which codes are replaced by which, against NumPy; what it is of without any, and with codes of no vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.base import parse_config
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.errors import UserError
from pipeline.core.image_io import png_bytes
from pipeline.evaluation.image_sets import StoredImage, images_at
from pipeline.evaluation.perturbed import code_vectors, perturbed, perturbed_features
from pipeline.evaluation.reconstruction import reconstruct
from pipeline.image_tokenizer.base import build
from tests.conftest import TINY
from tests.data.sample_images import image
from tests.data.small_run import MODEL
from tests.evaluation.pixels import pixels

CODEBOOK = {"kind": "ema", "codebook_size": 24, "code_width": 5}


def vqvae(quantizer: dict[str, object]) -> dict[str, object]:
    return {"kind": "vqvae", "patch_size": 4, "widths": [16], "blocks": 1, "block_kernels": [1], "bottleneck": 1,
            "quantizer": quantizer}  # fmt: skip


def stored(folder: Path, count: int) -> list[StoredImage]:
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png_bytes(image(number, (16, 16))))
    return images_at(folder)


def test_a_share_of_codes_becomes_one_of_the_nearest_each_as_numpy_finds_them() -> None:
    vectors, codes = torch.randn(40, 6), torch.randint(0, 40, (200, 16))
    found = perturbed(codes, vectors, 0.5, 5, [torch.Generator().manual_seed(i) for i in range(200)]).numpy()
    distances = ((vectors.numpy()[:, None] - vectors.numpy()[None]) ** 2).sum(axis=2)
    near = np.argsort(distances, axis=1)[:, :5]
    assert (found[..., None] == near[codes.numpy()]).any(axis=2).all()
    assert (found != codes.numpy()).mean() == pytest.approx(0.5 * 4 / 5, abs=0.03)  # a fifth are themselves
    ranks = (found[..., None] == near[codes.numpy()]).argmax(axis=2)
    assert np.bincount(ranks.ravel())[1:] == pytest.approx(3200 * 0.5 / 5, rel=0.2)


def test_without_replaced_codes_it_is_the_reconstructions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer, images = build(MODEL, 16), stored(tmp_path, 6)
    extractor = pixels()
    rebuilt = extractor(reconstruct(tokenizer, [one.image for one in images]), 6, "").features
    same = perturbed_features(tokenizer, images, (0.0, 5), extractor, 4, 0).features
    wrong = perturbed_features(tokenizer, images, (1.0, 32), extractor, 4, 0).features
    assert torch.equal(same, rebuilt)
    assert not torch.equal(wrong, rebuilt)
    assert torch.equal(wrong, perturbed_features(tokenizer, images, (1.0, 32), extractor, 4, 0).features)


@pytest.mark.parametrize("quantizer", [CODEBOOK, {**CODEBOOK, "depth": 2}], ids=str)
def test_which_codes_become_wrong_is_the_same_at_any_batch_size(tmp_path: Path, quantizer: dict[str, object]) -> None:
    torch.manual_seed(0)
    tokenizer, images = build(vqvae(quantizer), 16), stored(tmp_path, 7)
    found = [perturbed_features(tokenizer, images, (0.5, 8), pixels(), size, 0).features for size in (1, 3, 7)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[2], perturbed_features(tokenizer, images, (0.5, 8), pixels(), 7, 1).features)


@pytest.mark.parametrize("quantizer", [CODEBOOK, {**CODEBOOK, "depth": 2}, {"kind": "lfq", "bits": 6}], ids=str)
def test_every_level_has_the_vectors_of_its_codes(quantizer: dict[str, object]) -> None:
    tokenizer = build(vqvae(quantizer), 16)
    assert [len(book) for book in code_vectors(tokenizer)] == [level.codebook_size for level in tokenizer.levels]
    assert all(len(book.unique(dim=0)) == len(book) for book in code_vectors(tokenizer))


def test_grids_of_several_sizes_are_refused_before_a_run_starts() -> None:
    multiscale = {"kind": "multiscale", "scales": [1, 4], "codebook": CODEBOOK}
    values = load_pipeline(TINY).model_dump()
    values["evaluate"]["perturbations"] = [[0.5, 4]]
    values["image_tokenizer"]["model"] = vqvae(multiscale)
    with pytest.raises(UserError, match="not defined for quantizer multiscale"):
        parse_config(PipelineConfig, values, where="test")
    tokenizer = build(vqvae(multiscale), 16)
    with pytest.raises(UserError, match="not defined for quantizer multiscale"):
        code_vectors(tokenizer)


def test_a_config_says_shares_and_numbers_of_codes() -> None:
    assert EvaluateConfig.model_validate({"perturbations": [[0.5, 100]]}).perturbations == [(0.5, 100)]
    with pytest.raises(ValueError, match="less than or equal to 1"):
        EvaluateConfig.model_validate({"perturbations": [[50, 100]]})
