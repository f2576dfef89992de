"""Promises of transformers' image tokenizers in ours: its own code's codes and pixels, at two sizes of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.image_tokenizer import ImageTokenizer
from tests.image_tokenizer.golden_vqgan import seeded
from tests.image_tokenizer.test_pretrained import loaded

pytestmark = pytest.mark.slow  # transformers' models take their time to import


def images(side: int) -> Tensor:
    """[2,3,side,side] in [0,1]."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def with_seeded_weights(module: nn.Module, spread: float = 1.0) -> None:
    """`spread`: of the codes' vectors, so that images have many of them."""
    state = {name: list(value.shape) for name, value in module.state_dict().items() if value.is_floating_point()}
    weights = seeded(state)
    for name, value in weights.items():
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
    weights["quantize.embedding.weight"] *= spread
    module.load_state_dict(weights, strict=False)


@pytest.mark.parametrize(("multipliers", "blocks", "side"), [((1, 2), 1, 16), ((1, 1, 3), 2, 32)])
def test_janus_gives_the_same_codes_and_pixels(
    multipliers: tuple[int, ...], blocks: int, side: int, tmp_path: Path
) -> None:
    from transformers.models.janus.configuration_janus import JanusVQVAEConfig
    from transformers.models.janus.modeling_janus import JanusVQVAE

    config = JanusVQVAEConfig(
        embed_dim=6,
        num_embeddings=64,
        latent_channels=12,
        base_channels=32,
        channel_multiplier=list(multipliers),
        num_res_blocks=blocks,
        num_patches=side >> (len(multipliers) - 1),
    )
    janus = JanusVQVAE(config).eval()
    state = seeded({name: list(value.shape) for name, value in janus.state_dict().items()})
    # On the unit sphere, as it was trained: there its encode, which leaves that out, finds the same codes.
    state["quantize.embedding.weight"] = torch.nn.functional.normalize(state["quantize.embedding.weight"], dim=-1)
    janus.load_state_dict(state)
    janus.save_pretrained(tmp_path)
    tokenizer = loaded("transformers", tmp_path, side)
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        codes = janus.encode(2 * x - 1).image_tokens.view(2, -1)
        pixels = (janus.decode(codes) + 1) / 2
    [own] = tokenizer.encode(x)
    assert torch.equal(own, codes)
    assert len(codes.unique()) > 8
    torch.testing.assert_close(tokenizer.decode([codes]), pixels.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("multipliers", "blocks", "attention", "frames"), [([1, 2], 1, [1], 4), ([1, 1, 2], 2, [2], 2)]
)
def test_emu3_gives_the_same_codes_and_pixels(
    multipliers: list[int], blocks: int, attention: list[int], frames: int, tmp_path: Path
) -> None:
    from transformers.models.emu3.configuration_emu3 import Emu3VQVAEConfig
    from transformers.models.emu3.modeling_emu3 import Emu3VQVAE

    config = Emu3VQVAEConfig(
        codebook_size=64,
        temporal_downsample_factor=frames,
        base_channels=32,
        channel_multiplier=multipliers,
        num_res_blocks=blocks,
        attn_resolutions=attention,
        hidden_size=64,
    )
    emu3 = Emu3VQVAE(config).eval()
    with_seeded_weights(emu3, spread=0.1)
    emu3.save_pretrained(tmp_path / "theirs")
    loaded("transformers", tmp_path / "theirs", 32).save_pretrained(tmp_path / "ours")
    tokenizer, x = ImageTokenizer.from_pretrained(tmp_path / "ours"), images(32)
    with torch.no_grad():
        codes = torch.stack(emu3.encode(2 * x - 1, torch.tensor([[32, 32]] * 2)).image_tokens)
        pixels = (emu3.decode(codes) + 1) / 2
    [own] = tokenizer.encode(x)
    assert torch.equal(own, codes.flatten(1))
    assert len(codes.unique()) > 8
    torch.testing.assert_close(tokenizer.decode([own]), pixels.clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("multipliers", "blocks"), [([1, 2], 1), ([1, 1, 3], 2)])
def test_chameleon_gives_the_same_codes_and_its_decoder_is_learned(
    multipliers: list[int], blocks: int, tmp_path: Path
) -> None:
    """What transformers has of it has no decoder."""
    from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
    from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE

    config = ChameleonVQVAEConfig(
        embed_dim=5,
        num_embeddings=64,
        latent_channels=8,
        resolution=32,
        base_channels=32,
        channel_multiplier=multipliers,
        num_res_blocks=blocks,
        attn_resolutions=[16],
    )
    chameleon = ChameleonVQVAE(config).eval()
    with_seeded_weights(chameleon)
    chameleon.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="there is no 'decoder.conv_in.weight': with `train: decoder` a decoder is"
    ) as e:
        loaded("transformers", tmp_path, 32)
    assert "\n" not in str(e.value)
    tokenizer = loaded("transformers", tmp_path, 32, train="decoder").train()
    with torch.no_grad():
        codes = chameleon.encode(2 * images(32) - 1).image_tokens.view(2, -1)
    assert torch.equal(tokenizer.encode(images(32))[0], codes)
    assert len(codes.unique()) > 8
    objective = tokenizer.objective()
    loss, _ = objective({"images": (images(32) * 255).byte()}, 0)
    loss.backward()
    learns = {name for name, parameter in tokenizer.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in tokenizer.named_parameters() if name.startswith("decoder.")}
