"""Writes golden_vqgan.json: what diffusers' VQModel and taming-transformers' VQGAN make of seeded weights and images.

    pip install diffusers taming-transformers-rom1504 && python -m tests.image_tokenizer.golden_vqgan

The weights are a function of their names and shapes (`seeded`), so the file holds those, the codes, and a few pixels.
Made with diffusers 0.42.1, taming-transformers-rom1504 0.0.6 and torch 2.13.0 on a CPU; neither is a dependency of the
tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden_vqgan.json"
DIFFUSERS = {
    "two resolutions": {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 8, "vq_embed_dim": 4},
    "three resolutions": {
        "block_out_channels": [32, 32, 96],
        "layers_per_block": 2,
        "latent_channels": 6,
        "vq_embed_dim": 6,
    },
}
TAMING = {
    "attention at 16": {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": [16], "z_channels": 8},
    "attention at 16 and 8": {
        "ch": 32,
        "ch_mult": (1, 1, 3),
        "num_res_blocks": 2,
        "attn_resolutions": [16, 8],
        "z_channels": 6,
    },
}
CASES = [*(("diffusers", name) for name in DIFFUSERS), *(("taming", name) for name in TAMING)]
SIDE = 32
EVERY = 97  # of the pixels' values, one is kept


def seeded(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights for these names and shapes; norms near 1, and codes far enough apart for rounding to move none."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        value = torch.randn(list(shape), generator=generator)
        spread = 1.0 if "embedding" in name else (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        state[name] = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + spread * value
    return state


def images() -> Tensor:
    """[2,3,SIDE,SIDE] in [0,1]."""
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7))


def of_diffusers(size: dict[str, Any]) -> dict[str, object]:
    from diffusers import VQModel

    count = len(size["block_out_channels"])
    model = VQModel(
        down_block_types=["DownEncoderBlock2D"] * count,
        up_block_types=["UpDecoderBlock2D"] * count,
        num_vq_embeddings=48,
        **size,
    ).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(seeded(shapes))
    latents = model.encode(2 * images() - 1).latents
    return _line(shapes, model.quantize(latents)[2][2], model.decode(latents).sample)


def of_taming(size: dict[str, Any]) -> dict[str, object]:
    """Its parts put together here: its own class needs pytorch-lightning."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import VectorQuantizer2

    half = {"out_ch": 3, "in_channels": 3, "resolution": SIDE, "double_z": False, "dropout": 0.0, **size}
    width = size["z_channels"]
    model = nn.ModuleDict(
        {
            "encoder": Encoder(**half),
            "decoder": Decoder(**half),
            "quantize": VectorQuantizer2(48, 5, beta=0.25),
            "quant_conv": nn.Conv2d(width, 5, 1),
            "post_quant_conv": nn.Conv2d(5, width, 1),
        }
    ).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(seeded(shapes))
    vectors, _, (_, _, codes) = model["quantize"](model["quant_conv"](model["encoder"](2 * images() - 1)))
    return _line(shapes, codes, model["decoder"](model["post_quant_conv"](vectors)))


def _line(shapes: dict[str, list[int]], codes: Tensor, output: Tensor) -> dict[str, object]:
    pixels = ((output + 1) / 2).flatten()[::EVERY]
    return {"shapes": shapes, "codes": codes.view(2, -1).tolist(), "pixels": pixels.tolist()}


@torch.no_grad()
def main() -> None:
    golden = {f"diffusers, {name}": of_diffusers(size) for name, size in DIFFUSERS.items()}
    golden |= {f"taming, {name}": of_taming(size) for name, size in TAMING.items()}
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
