"""VQGANs of other libraries: which model their weights are of, and its tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.config.image_tokenizer_model import ModelConfig, VQGANConfig
from pipeline.config.quantizers import CodebookConfig, GumbelConfig, QuantizerConfig
from pipeline.config.schedules import CosineRamp
from pipeline.image_tokenizer.pretrained import names, still_frame
from pipeline.image_tokenizer.pretrained.names import Library, their_names
from pipeline.image_tokenizer.pretrained.weights import Weights

State = dict[str, Tensor]


def around(library: str) -> tuple[Sequence[str], Sequence[str]]:
    """Prefixes of all names, and beginnings of names that no image depends on: `Weights.read`."""
    if library == "taming":
        return ("first_stage_model.",), ("loss.", "model_ema.")
    if library == "llamagen":
        return (), ("quantize.codebook_used",)
    return ("model.vqmodel.",) if library == "transformers" else (), ()


def library_of(weights: Weights) -> Library:
    """The names that these weights have, as far as the first of them say."""
    if weights.config.library == "taming":
        return names.GUMBEL if names.GUMBEL.codebook in weights else names.TAMING
    if weights.config.library == "transformers":
        if "encoder.down_block.down.0.block.0.conv1.weight" in weights:
            return names.EMU3
        return names.JANUS if "decoder.conv_in.weight" in weights else names.CHAMELEON
    return names.LLAMAGEN if weights.config.library == "llamagen" else names.DIFFUSERS


def model_of(weights: Weights) -> VQGANConfig:
    """The architecture that weights of such names and shapes have. Raises UserError when there is none."""
    library = library_of(weights)

    def first(i: int, part: str) -> str:
        return f"{library.encoder.format(i=i)}.{part.format(j=0)}"

    channels, resolutions, blocks = weights.size("encoder.conv_in.weight"), 0, 0
    while f"{first(resolutions, library.block)}.conv1.weight" in weights:
        resolutions += 1
    while f"{library.encoder.format(i=0)}.{library.block.format(j=blocks)}.conv1.weight" in weights:
        blocks += 1
    widths = [weights.size(f"{first(i, library.block)}.conv1.weight") for i in range(resolutions)]
    if not widths or channels % 32 or any(width % channels for width in widths):
        raise weights.wrong(f"found {channels} channels, then {widths}, where multiples of 32 were expected")
    if not library.has_decoder and weights.config.train is None:
        raise weights.wrong("there is no 'decoder.conv_in.weight': with `train: decoder` a decoder is learned")
    query = f"{library.attention['q']}.weight"
    return VQGANConfig(
        kind="vqgan",
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=tuple(i for i in range(resolutions) if first(i, query) in weights),
        latent_width=weights.size("encoder.conv_out.weight"),
        quantizer=_quantizer_of(weights, library),
        spatial_norm=f"decoder.{library.norm}.conv_y.weight" in weights,
        frames=still_frame.frames(weights) if library is names.EMU3 else 0,
    )


def _quantizer_of(weights: Weights, library: Library) -> QuantizerConfig:
    codes, width = weights.size(library.codebook), weights.size(library.codebook, 1)
    if library is names.GUMBEL:  # at the end of its training: no schedule begins anew
        none, end = CosineRamp(start=0, end=0, steps=0), CosineRamp(start=1 / 16, end=1 / 16, steps=0)
        return GumbelConfig(
            kind="gumbel",
            codebook_size=codes,
            code_width=width,
            logits="linear",
            batch_entropy_weight=none,
            temperature=end,
        )
    return CodebookConfig(
        kind="gradient",
        codebook_size=codes,
        code_width=width,
        normalize=library.normalized,
        dead_code_threshold=0,
        kmeans_iterations=0,
    )


def tensors(weights: Weights, model: ModelConfig, own: State) -> State:
    """Their tensors by our names, in the form of ours in `own`. Raises UserError when one is missing or has another."""
    assert isinstance(model, VQGANConfig)
    library = library_of(weights)
    gumbel = library is names.GUMBEL
    book = "quantizers.0.codebook" if gumbel else "quantizers.0.codebooks.0.embedding"
    pairs = [*their_names(model, library), (book, library.codebook)]
    found = {ours: weights.take_like(theirs, own[ours]) for ours, theirs in pairs}
    if gumbel:
        found |= _logits(weights)
    return found | (still_frame.tensors(weights, model) if model.frames else {})


def _logits(weights: Weights) -> State:
    """GumbelVQ has two 1×1 convolutions between the encoder and its logits, which are one."""
    codes, width = weights.size("quantize.proj.weight"), weights.size("quant_conv.weight")
    latent = weights.size("quant_conv.weight", 1)
    first = weights.take("quant_conv.weight", width, latent, 1, 1).flatten(1).double()
    second = weights.take("quantize.proj.weight", codes, width, 1, 1).flatten(1).double()
    bias = second @ weights.take("quant_conv.bias", width).double() + weights.take("quantize.proj.bias", codes).double()
    return {"quantizers.0.project.weight": (second @ first).float(), "quantizers.0.project.bias": bias.float()}
