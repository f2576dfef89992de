"""Writes golden_diffusers.json: what diffusers' VQModel makes of seeded weights and images.

    pip install diffusers && python -m tests.image_tokenizer.golden_vqgan

The weights are a function of their names and shapes (`seeded`), so the file holds those, the codes, and a few pixels.
Made with diffusers 0.42.1 and torch 2.13.0 on a CPU. diffusers itself is no dependency of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden_diffusers.json"
SIZES = {
    "two resolutions": {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 8, "vq_embed_dim": 4},
    "three resolutions": {
        "block_out_channels": [32, 32, 96],
        "layers_per_block": 2,
        "latent_channels": 6,
        "vq_embed_dim": 6,
    },
}
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


def main() -> None:
    from diffusers import VQModel

    golden: dict[str, object] = {}
    for name, size in SIZES.items():
        count = len(size["block_out_channels"])  # type: ignore[arg-type]
        model = VQModel(
            down_block_types=["DownEncoderBlock2D"] * count,
            up_block_types=["UpDecoderBlock2D"] * count,
            num_vq_embeddings=48,
            **size,
        ).eval()
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict(seeded(shapes))
        with torch.no_grad():
            latents = model.encode(2 * images() - 1).latents
            codes = model.quantize(latents)[2][2].view(2, -1)
            pixels = (model.decode(latents).sample + 1) / 2
        golden[name] = {"shapes": shapes, "codes": codes.tolist(), "pixels": pixels.flatten()[::EVERY].tolist()}
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
