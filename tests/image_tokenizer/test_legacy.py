"""Promise: weights that the version before wrote load, and give the codes and images that they gave."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.core.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.image_tokenizer.legacy import renamed_modules

SHAPE = {"patch_size": 2, "blocks": 2, "block_kernels": (3, 1), "stem_kernel": 1}
EMA = {"kind": "ema", "codebook_size": 32, "code_width": 8}
DVAE = {"kind": "dvae", "codebook_size": 32, "code_width": 8, "widths": (16, 32)}
MODELS = {
    "dvae": DVAE,
    "dvae by distance": DVAE | {"logits": "distance", "widths": (16,)},
    "continuous depth": DVAE | {"block": "ode"},
    "residual": {"kind": "vqvae", "widths": (16, 16, 32), "quantizer": EMA | {"depth": 2}},
    "two grids": {"kind": "vqvae2", "widths": (16, 32), "quantizers": [EMA, EMA | {"kind": "gradient"}]},
}

# A few names as the version before wrote them, whatever the rules say.
WRITTEN = {
    "dvae": {
        "codebook",
        "to_logits.weight",
        "encoder.layers.1.weight",
        "encoder.layers.2.branch.1.weight",
        "encoder.layers.5.weight",
        "encoder.layers.7.branch.3.bias",
        "decoder.layers.0.weight",
        "decoder.layers.4.weight",
        "decoder.layers.6.branch.3.weight",
        "decoder.layers.8.bias",
    },
    "dvae by distance": {"log_scale", "to_logits.bias", "encoder.layers.3.branch.1.weight", "decoder.layers.4.weight"},
    "continuous depth": {"encoder.layers.5.branches.1.3.weight", "decoder.layers.4.branches.0.1.bias"},
    "residual": {
        "quantizers.0.codebooks.1.used",
        "quantizers.0.codebooks.1.sums",
        "quantizers.0.codebooks.0.embedding",
        "encoder.layers.9.weight",
        "decoder.layers.9.branch.1.weight",
        "decoder.layers.12.weight",
    },
    "two grids": {"quantizers.1.codebooks.0.used", "quantizers.0.codebooks.0.sums", "expand.0.weight"},
}


def rewrite_as_before(folder: Path, tokenizer: ImageTokenizer) -> set[str]:
    """Give the saved weights the names that they had; returns these."""
    old = {today: name for name, today in renamed_modules(tokenizer.config).items()}  # type: ignore[arg-type]
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        prefix = next((p for p in sorted(old, key=len, reverse=True) if name == p or name.startswith(f"{p}.")), None)
        state[old[prefix] + name[len(prefix) :] if prefix else name] = value
    save_file(state, folder / "model.safetensors")
    return set(state)


@pytest.mark.parametrize("name", MODELS)
def test_weights_with_the_names_of_the_version_before_give_equal_codes_and_images(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    tokenizer = build(SHAPE | MODELS[name], image_size=16).eval()
    images = torch.rand(3, 3, 16, 16)
    codes = tokenizer.encode(images)
    tokenizer.save_pretrained(tmp_path)
    names = rewrite_as_before(tmp_path, tokenizer)
    assert WRITTEN[name] <= names
    assert not names & {n for n in tokenizer.state_dict() if n.startswith(("encoder.", "decoder."))}
    with caplog.at_level(logging.INFO):
        loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert "weights of the version before" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(images), codes, strict=True))
    assert torch.equal(loaded.decode(codes), tokenizer.decode(codes))


def test_old_weights_of_another_model_are_still_a_one_line_error(tmp_path: Path) -> None:
    tokenizer = build(SHAPE | DVAE, image_size=16)
    tokenizer.save_pretrained(tmp_path)
    rewrite_as_before(tmp_path, tokenizer)
    state = load_file(tmp_path / "model.safetensors")
    del state["to_logits.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit config.json.*quantizers\.0\.project\.weight") as caught:
        ImageTokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
