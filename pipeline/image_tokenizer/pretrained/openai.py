"""OpenAI's dVAE (package `dall_e`), from its halves' state dicts: which model they are of, and its tensors.

It was published as two pickled modules, which are not read here. Where they are trusted, with that package:

    for half in ("encoder", "decoder"):
        safetensors.torch.save_file(torch.load(f"{half}.pkl", weights_only=False).state_dict(), f"{half}.safetensors")
"""

from __future__ import annotations

from torch import Tensor

from pipeline.config.image_tokenizer_model import OpenAIDVAEConfig
from pipeline.config.schedules import CosineRamp
from pipeline.image_tokenizer.pretrained.weights import Weights

PREFIXES = ("module.",)
State = dict[str, Tensor]


def model_of(weights: Weights) -> OpenAIDVAEConfig:
    """The architecture that weights of such names and shapes have. Raises UserError when there is none."""
    groups = blocks = 0
    while _last(groups + 1, 1) in weights:
        groups += 1
    while _last(1, blocks + 1) in weights:
        blocks += 1
    if not groups:
        raise weights.wrong(f"there is no '{_last(1, 1)}'")
    return OpenAIDVAEConfig(
        kind="openai-dvae",
        widths=tuple(weights.size(_last(group, 1)) for group in range(1, groups + 1)),
        blocks=blocks,
        codebook_size=weights.size("encoder.blocks.output.conv.w"),
        code_width=weights.size("decoder.blocks.input.w"),
        # At the end of its training: no schedule begins anew.
        kl_weight=CosineRamp(start=6.6, end=6.6, steps=0),
        temperature=CosineRamp(start=1 / 16, end=1 / 16, steps=0),
    )


def tensors(weights: Weights, own: State) -> State:
    """Their tensors by our names, in the form of ours in `own`. Raises UserError when one is missing or has another."""
    found = {name: weights.take_like(_their_name(name), value) for name, value in own.items() if name != _CODEBOOK}
    width = weights.size("decoder.blocks.input.w")
    # The first convolution of the decoder, over one-hot codes, is a table of vectors.
    kernel = weights.take("decoder.blocks.input.w", width, len(own[_CODEBOOK]), 1, 1).flatten(1)
    found[_CODEBOOK] = kernel.T + weights.take("decoder.blocks.input.b", width)
    return found


_CODEBOOK = "quantizers.0.codebook"


def _last(group: int, block: int) -> str:
    return f"encoder.blocks.group_{group}.block_{block}.res_path.conv_4.w"


def _their_name(name: str) -> str:
    """Of one of our parameters."""
    module, kind = name.rsplit(".", 1)
    end = "w" if kind == "weight" else "b"
    alone = {"encoder.stem": "encoder.blocks.input", "decoder.head": "decoder.blocks.output.conv"}
    alone["quantizers.0.project"] = "encoder.blocks.output.conv"
    if module in alone:
        return f"{alone[module]}.{end}"
    half, _, group, _, block, *rest = module.split(".")  # encoder.resolutions.0.blocks.1.branch.3
    path = "id_path" if rest == ["shortcut"] else f"res_path.conv_{(int(rest[1]) + 1) // 2}"
    return f"{half}.blocks.group_{int(group) + 1}.block_{int(block) + 1}.{path}.{end}"
