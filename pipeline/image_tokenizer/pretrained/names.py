"""What each library calls the modules of its VQGAN."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.config.image_tokenizer_model import VQGANConfig


@dataclass(frozen=True)
class Library:
    """Names of modules; `{i}` is a resolution, `{j}` a block."""

    encoder: str = "encoder.down.{i}"
    decoder: str = "decoder.up.{i}"
    decoder_starts_finest: bool = False
    block: str = "block.{j}"
    shortcut: str = "nin_shortcut"
    attention: Mapping[str, str] = field(default_factory=lambda: _parts("attn.{j}."))
    down: str = "downsample.conv"
    up: str = "upsample.conv"
    middle: tuple[str, str] = ("mid.block_1", "mid.block_2")
    middle_attention: Mapping[str, str] = field(default_factory=lambda: _parts("mid.attn_1."))
    norm: str = "norm_out"
    codebook: str = "quantize.embedding.weight"
    normalized: bool = False  # vectors and codes on the unit sphere
    has_decoder: bool = True


def _parts(prefix: str) -> dict[str, str]:
    return {
        "norm": f"{prefix}norm",
        "q": f"{prefix}q",
        "k": f"{prefix}k",
        "v": f"{prefix}v",
        "out": f"{prefix}proj_out",
    }


def _linear_parts(norm: str, attention: str) -> dict[str, str]:
    return {"norm": norm, "out": f"{attention}.out_proj"} | {part: f"{attention}.{part}_proj" for part in "qkv"}


def _diffusers_parts(attention: str) -> dict[str, str]:
    parts = {part: f"{attention}.to_{part}" for part in "qkv"}
    return {"norm": f"{attention}.group_norm", "out": f"{attention}.to_out.0"} | parts


TAMING = Library(decoder_starts_finest=True)
GUMBEL = replace(TAMING, codebook="quantize.embed.weight")
LLAMAGEN = Library(
    encoder="encoder.conv_blocks.{i}",
    decoder="decoder.conv_blocks.{i}",
    block="res.{j}",
    middle=("mid.0", "mid.2"),
    middle_attention=_parts("mid.1."),
    normalized=True,
)
JANUS = Library(normalized=True)
CHAMELEON = Library(has_decoder=False)
EMU3 = Library(
    encoder="encoder.down_block.down.{i}",
    decoder="decoder.up_block.up.{i}",
    decoder_starts_finest=True,
    attention=_linear_parts("attn_norms.{j}", "attn.{j}"),
    middle=("middle_block.block_1", "middle_block.block_2"),
    middle_attention=_linear_parts("middle_block.attn_norm", "middle_block.attn_1"),
)
DIFFUSERS = Library(
    encoder="encoder.down_blocks.{i}",
    decoder="decoder.up_blocks.{i}",
    block="resnets.{j}",
    shortcut="conv_shortcut",
    attention=_diffusers_parts("attentions.{j}"),
    down="downsamplers.0.conv",
    up="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    middle_attention=_diffusers_parts("mid_block.attentions.0"),
    norm="conv_norm_out",
)


def their_names(config: VQGANConfig, library: Library) -> Iterator[tuple[str, str]]:
    """Pairs of our parameter's name and theirs, of the tensors that are the same but for a dimension of one."""
    modules = [*_modules(config, library)]
    if not config.frames:
        modules.append(("decoder.stem.project", "post_quant_conv"))
        if library.codebook == Library.codebook:
            modules.append(("quantizers.0.project", "quant_conv"))
    for ours, theirs in modules:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _modules(config: VQGANConfig, library: Library) -> Iterator[tuple[str, str]]:
    widths = config.channels_of_resolutions
    halves = [("encoder", "encoder.stem", "encoder.middle", (config.channels, *widths), False)]
    if library.has_decoder:
        order = (widths[-1], *widths[::-1])
        halves.append(("decoder", "decoder.stem.conv", "decoder.stem.middle", order, config.spatial_norm))
    for half, stem, middle, order, spatial in halves:
        yield stem, f"{half}.conv_in"
        yield f"{half}.head", f"{half}.conv_out"
        yield from _norm(f"{half}.norm", f"{half}.{library.norm}", spatial)
        before, after = (f"{half}.{name}" for name in library.middle)
        yield from _block(f"{middle}.before", before, None, spatial)
        yield from _attention(f"{middle}.attention", f"{half}.", library.middle_attention, spatial)
        yield from _block(f"{middle}.after", after, None, spatial)
        for i in range(len(widths)):
            yield from _resolution(half, i, order[i] != order[i + 1], config, library)


def _resolution(
    half: str, i: int, changes_width: bool, config: VQGANConfig, library: Library
) -> Iterator[tuple[str, str]]:
    encodes, last = half == "encoder", len(config.multipliers) - 1
    spatial = config.spatial_norm and not encodes
    number = last - i if not encodes and library.decoder_starts_finest else i
    ours = f"{half}.resolutions.{i}"
    theirs = (library.encoder if encodes else library.decoder).format(i=number)
    for j in range(config.blocks if encodes else config.blocks + 1):
        shortcut = library.shortcut if changes_width and j == 0 else None
        yield from _block(f"{ours}.blocks.{j}", f"{theirs}.{library.block.format(j=j)}", shortcut, spatial)
        if (i if encodes else last - i) in config.attention:
            parts = {part: name.format(j=j) for part, name in library.attention.items()}
            yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.", parts, spatial)
    if i < last:
        yield f"{ours}.to_next.conv", f"{theirs}.{library.down if encodes else library.up}"


def _block(ours: str, theirs: str, shortcut: str | None, spatial: bool) -> Iterator[tuple[str, str]]:
    for part in ("norm1", "norm2"):
        yield from _norm(f"{ours}.{part}", f"{theirs}.{part}", spatial)
    for part in ("conv1", "conv2"):
        yield f"{ours}.{part}", f"{theirs}.{part}"
    if shortcut:
        yield f"{ours}.shortcut", f"{theirs}.{shortcut}"


def _attention(ours: str, prefix: str, parts: Mapping[str, str], spatial: bool) -> Iterator[tuple[str, str]]:
    yield from _norm(f"{ours}.norm", f"{prefix}{parts['norm']}", spatial)
    for part in ("q", "k", "v", "out"):
        yield f"{ours}.{part}", f"{prefix}{parts[part]}"


def _norm(ours: str, theirs: str, spatial: bool) -> Iterator[tuple[str, str]]:
    if not spatial:
        yield ours, theirs
        return
    yield from ((f"{ours}.norm", f"{theirs}.norm_layer"), (f"{ours}.scale", f"{theirs}.conv_y"))
    yield f"{ours}.shift", f"{theirs}.conv_b"
