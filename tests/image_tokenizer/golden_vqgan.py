"""Writes golden_vqgan.json: what other libraries' tokenizers make of seeded weights and images.

    pip install diffusers taming-transformers-rom1504 dall-e && python -m tests.image_tokenizer.golden_vqgan

diffusers' VQModel, taming-transformers' VQModel and GumbelVQ, OpenAI's dVAE. The weights are a function of their names
and shapes (`seeded`), so the file holds those, the codes, and a few pixels. Made with diffusers 0.42.1,
taming-transformers-rom1504 0.0.6, dall-e 0.1 and torch 2.13.0 on a CPU; none is a dependency of the tests. What is in
the file and cannot be made again for want of a package stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
OPENAI = {
    "one block a group": {"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512, "n_init": 16},
    "two blocks a group": {"n_hid": 64, "n_blk_per_group": 2, "vocab_size": 600, "n_init": 128},
}
SIDE = 32
EVERY = 97  # of the pixels' values, one is kept


def seeded(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights for these names and shapes; norms near 1, and codes far enough apart for rounding to move none."""
    state = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        value = torch.randn(list(shape), generator=generator)
        spread = (
            1.0
            if "embedding" in name or name == "decoder.blocks.input.w"
            else (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        )
        state[name] = (1.0 if "norm" in name and name.endswith("weight") else 0.0) + spread * value
    return state


def images(patch: int = 1) -> Tensor:
    """[2,3,SIDE,SIDE] in [0,1], of patches of one color."""
    side = SIDE // patch
    colors = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(7))
    return colors.repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def images_for(library: str) -> Tensor:
    """Those that it sees: OpenAI's codes are few where its pooling sees noise."""
    return images(8 if library == "openai" else 1)


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


def of_taming(size: dict[str, Any], gumbel: bool = False) -> dict[str, object]:
    """Its parts put together here: its own class needs pytorch-lightning."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

    half = {"out_ch": 3, "in_channels": 3, "resolution": SIDE, "double_z": False, "dropout": 0.0, **size}
    width = size["z_channels"]
    codes_width = width if gumbel else 5
    model = nn.ModuleDict(
        {
            "encoder": Encoder(**half),
            "decoder": Decoder(**half),
            "quantize": GumbelQuantize(width, width, 48) if gumbel else VectorQuantizer2(48, 5, beta=0.25),
            "quant_conv": nn.Conv2d(width, codes_width, 1),
            "post_quant_conv": nn.Conv2d(codes_width, width, 1),
        }
    ).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(seeded(shapes))
    z, quantize = model["quant_conv"](model["encoder"](2 * images() - 1)), model["quantize"]
    if gumbel:  # its forward pass draws, in evaluation too
        codes = quantize.proj(z).argmax(1)
        side = codes.shape[-1]
        vectors = quantize.get_codebook_entry(codes.flatten(), (len(codes), side, side, width))
    else:
        vectors, _, (_, _, codes) = quantize(z)
    return _line(shapes, codes, model["decoder"](model["post_quant_conv"](vectors)))


def of_openai(size: dict[str, Any]) -> dict[str, object]:
    from dall_e import Decoder, Encoder, map_pixels
    from dall_e.utils import logit_laplace_eps

    initial = {key: value for key, value in size.items() if key != "n_init"}
    model = nn.ModuleDict({"encoder": Encoder(**initial), "decoder": Decoder(**size)})
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(seeded(shapes))
    codes = model["encoder"](map_pixels(images_for("openai"))).argmax(1)
    one_hot = nn.functional.one_hot(codes, size["vocab_size"]).permute(0, 3, 1, 2).float()
    shrunk = model["decoder"](one_hot)[:, :3].sigmoid()
    pixels = (shrunk - logit_laplace_eps) / (1 - 2 * logit_laplace_eps)  # `unmap_pixels` without its clamp
    return _line(shapes, codes, 2 * pixels - 1)


def _line(shapes: dict[str, list[int]], codes: Tensor, output: Tensor) -> dict[str, object]:
    pixels = ((output + 1) / 2).flatten()[::EVERY]
    return {"shapes": shapes, "codes": codes.view(2, -1).tolist(), "pixels": pixels.tolist()}


MADE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, object]], dict[str, dict[str, Any]]]] = {
    "diffusers": (of_diffusers, DIFFUSERS),
    "taming": (of_taming, TAMING),
    "taming, gumbel": (partial(of_taming, gumbel=True), TAMING),
    "openai": (of_openai, OPENAI),
}
CASES = [(library, name) for library, (_, sizes) in MADE.items() for name in sizes]


@torch.no_grad()
def main() -> None:
    golden = json.loads(GOLDEN.read_text())
    for library, (make, sizes) in MADE.items():
        try:
            golden |= {f"{library}, {name}": make(size) for name, size in sizes.items()}
        except ModuleNotFoundError as error:
            print(f"{library}: stays as it is ({error})")
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
