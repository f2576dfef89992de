"""Image tokenizers of other libraries: their weights, in our VQGAN (vqgan.py).

    tokenizer = load_pretrained(PretrainedTokenizerConfig(library="llamagen", path="vq_ds16_c2i.pt"), image_size=256)

`LIBRARIES` says what each library calls its modules. The shape of the model is read from the shapes of its weights, so
no config beside them is needed, and what does not fit is named. Nothing but tensors is ever read from a file:
safetensors, or torch.load(weights_only=True).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.config.image_tokenizer import ImageTokenizerConfig, ModelConfig, PretrainedTokenizerConfig, VQGANConfig
from pipeline.config.quantizers import CodebookConfig
from pipeline.core.errors import UserError
from pipeline.core.weights import weight_files
from pipeline.image_tokenizer.base import ImageTokenizer, build

log = logging.getLogger(__name__)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Library:
    """What a library calls the modules of its VQGAN; `{i}` is a resolution, `{j}` a block."""

    encoder: str = "encoder.down.{i}"
    decoder: str = "decoder.up.{i}"
    decoder_starts_finest: bool = False
    block: str = "block.{j}"
    shortcut: str = "nin_shortcut"
    attention: str = "attn.{j}"
    attention_parts: Mapping[str, str] = field(
        default_factory=lambda: {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"}
    )
    down: str = "downsample.conv"
    up: str = "upsample.conv"
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    norm: str = "norm_out"
    normalized: bool = False  # vectors and codes on the unit sphere
    prefixes: tuple[str, ...] = ()  # of all names, in files that hold more than the tokenizer
    ignored: tuple[str, ...] = ()  # beginnings of names that no image depends on


LIBRARIES = {
    "taming": Library(decoder_starts_finest=True, prefixes=("first_stage_model.",), ignored=("loss.", "model_ema.")),
    "llamagen": Library(
        encoder="encoder.conv_blocks.{i}",
        decoder="decoder.conv_blocks.{i}",
        block="res.{j}",
        middle=("mid.0", "mid.1", "mid.2"),
        normalized=True,
        ignored=("quantize.codebook_used",),
    ),
    "transformers": Library(normalized=True, prefixes=("model.vqmodel.",)),
    "diffusers": Library(
        encoder="encoder.down_blocks.{i}",
        decoder="decoder.up_blocks.{i}",
        block="resnets.{j}",
        shortcut="conv_shortcut",
        attention="attentions.{j}",
        attention_parts={"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
        down="downsamplers.0.conv",
        up="upsamplers.0.conv",
        middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm="conv_norm_out",
    ),
}
_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_CODEBOOK, _OUR_CODEBOOK = "quantize.embedding.weight", "quantizers.0.codebooks.0.embedding"
_OF_TRAINING = tuple(f"quantizers.0.codebooks.0.{name}" for name in ("ema_counts", "started"))  # no weights


def new_tokenizer(section: ImageTokenizerConfig, image_size: int) -> ImageTokenizer:
    """What the stage begins with: random weights, or those of `pretrained`."""
    if section.pretrained:
        return load_pretrained(section.pretrained, image_size)
    return build(section.model, image_size)


def load_pretrained(config: PretrainedTokenizerConfig, image_size: int) -> ImageTokenizer:
    """The tokenizer in evaluation mode, with gradients only for what `config.train` names.

    Raises UserError when there are no weights, or they are not of such a model, or images of that size do not fit.
    """
    library, state = LIBRARIES[config.library], _read(config)
    model = _config_of(state, library, config)
    tokenizer = build(model, image_size, where=config.path)
    named = dict(their_names(model, library))
    own = tokenizer.state_dict()
    loaded = {name: own[name] for name in _OF_TRAINING}
    loaded[_OF_TRAINING[1]] = torch.ones_like(own[_OF_TRAINING[1]])  # k-means does not begin anew
    for name, value in own.items():
        if name not in loaded:
            loaded[name] = _fitting(state, named[name], value, config)
    if left := sorted(state.keys() - set(named.values())):
        raise _no_model(
            config, f"found '{left[0]}'{f' and {len(left) - 1} more' if left[1:] else ''}, which it has not"
        )
    tokenizer.load_state_dict(loaded)
    _choose_gradients(tokenizer, config.train)
    log.info("%s: %d tensors of %s's, %s", config.path, len(named), config.library, _shape(model))
    return tokenizer.eval()


def model_of(section: ImageTokenizerConfig) -> ModelConfig:
    """The model of the section, or that of `pretrained`'s weights."""
    if (config := section.pretrained) is None:
        return section.model
    return _config_of(_read(config), LIBRARIES[config.library], config)


def their_names(config: VQGANConfig, library: Library) -> Iterator[tuple[str, str]]:
    """Pairs of our parameter's name and theirs."""
    yield _OUR_CODEBOOK, _CODEBOOK
    for ours, theirs in _modules(config, library):
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _modules(config: VQGANConfig, library: Library) -> Iterator[tuple[str, str]]:
    yield "quantizers.0.project", "quant_conv"
    yield "encoder.stem", "encoder.conv_in"
    yield "decoder.stem.project", "post_quant_conv"
    yield "decoder.stem.conv", "decoder.conv_in"
    widths = config.channels_of_resolutions
    for half, middle, order in (
        ("encoder", "encoder.middle", (config.channels, *widths)),
        ("decoder", "decoder.stem.middle", (widths[-1], *widths[::-1])),
    ):
        yield f"{half}.norm", f"{half}.{library.norm}"
        yield f"{half}.head", f"{half}.conv_out"
        before, attention, after = (f"{half}.{name}" for name in library.middle)
        yield from _block(f"{middle}.before", before, library, shortcut=False)
        yield from _attention(f"{middle}.attention", attention, library)
        yield from _block(f"{middle}.after", after, library, shortcut=False)
        for i in range(len(widths)):
            yield from _resolution(half, i, order[i] != order[i + 1], config, library)


def _resolution(
    half: str, i: int, changes_width: bool, config: VQGANConfig, library: Library
) -> Iterator[tuple[str, str]]:
    encodes, last = half == "encoder", len(config.multipliers) - 1
    number = last - i if not encodes and library.decoder_starts_finest else i
    ours = f"{half}.resolutions.{i}"
    theirs = (library.encoder if encodes else library.decoder).format(i=number)
    for j in range(config.blocks if encodes else config.blocks + 1):
        block = f"{theirs}.{library.block.format(j=j)}"
        yield from _block(f"{ours}.blocks.{j}", block, library, shortcut=changes_width and j == 0)
        if (i if encodes else last - i) in config.attention:
            yield from _attention(f"{ours}.attentions.{j}", f"{theirs}.{library.attention.format(j=j)}", library)
    if i < last:
        yield f"{ours}.to_next.conv", f"{theirs}.{library.down if encodes else library.up}"


def _block(ours: str, theirs: str, library: Library, shortcut: bool) -> Iterator[tuple[str, str]]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{ours}.{part}", f"{theirs}.{part}"
    if shortcut:
        yield f"{ours}.shortcut", f"{theirs}.{library.shortcut}"


def _attention(ours: str, theirs: str, library: Library) -> Iterator[tuple[str, str]]:
    for part, name in library.attention_parts.items():
        yield f"{ours}.{part}", f"{theirs}.{name}"


def _config_of(state: State, library: Library, config: PretrainedTokenizerConfig) -> VQGANConfig:
    """The architecture that weights of such names and shapes have."""

    def size(name: str, dimension: int = 0) -> int:
        if name not in state:
            raise _no_model(config, f"there is no '{name}'")
        return state[name].shape[dimension]

    def first(i: int, part: str) -> str:
        return f"{library.encoder.format(i=i)}.{part.format(j=0)}"

    channels, resolutions, blocks = size("encoder.conv_in.weight"), 0, 0
    while f"{first(resolutions, library.block)}.conv1.weight" in state:
        resolutions += 1
    while f"{library.encoder.format(i=0)}.{library.block.format(j=blocks)}.conv1.weight" in state:
        blocks += 1
    widths = [size(f"{first(i, library.block)}.conv1.weight") for i in range(resolutions)]
    if not widths or channels % 32 or any(width % channels for width in widths):
        raise _no_model(config, f"found {channels} channels, then {widths}, where multiples of 32 were expected")
    query = f"{library.attention}.{library.attention_parts['q']}.weight"
    book = CodebookConfig(
        kind="gradient",
        codebook_size=size(_CODEBOOK),
        code_width=size(_CODEBOOK, 1),
        normalize=library.normalized,
        dead_code_threshold=0,
        kmeans_iterations=0,
    )
    return VQGANConfig(
        kind="vqgan",
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        blocks=blocks,
        attention=tuple(i for i in range(resolutions) if first(i, query) in state),
        latent_width=size("encoder.conv_out.weight"),
        quantizer=book,
    )


def _fitting(state: State, name: str, own: Tensor, config: PretrainedTokenizerConfig) -> Tensor:
    """Their tensor in the form of ours: 1×1 convolutions and matrices are the same."""
    if name not in state:
        raise _no_model(config, f"there is no '{name}'")
    found = state[name]
    if [n for n in found.shape if n > 1] != [n for n in own.shape if n > 1]:
        raise _no_model(config, f"'{name}' is {list(found.shape)}, where {list(own.shape)} was expected")
    return found.reshape(own.shape).to(own.dtype)


def _read(config: PretrainedTokenizerConfig) -> State:
    """All tensors that belong to the tokenizer, by their library's names."""
    path, library = Path(config.path), LIBRARIES[config.library]
    if path.is_dir():
        names = weight_files(path) or [name for name in _FILES if (path / name).is_file()]
        if not names:
            raise UserError(
                f"{path}: expected the weights of a tokenizer of {config.library}'s, {' or '.join(_FILES)}, found"
                " neither: give the folder that has one, or the file itself"
            )
        files = [path / name for name in names]
    else:
        files = [path]
    state = {name: value for file in files for name, value in _tensors(file).items()}
    for prefix in library.prefixes:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {name: value for name, value in state.items() if not name.startswith(library.ignored)}


def _tensors(file: Path) -> State:
    if not file.is_file():
        raise UserError(f"image_tokenizer.pretrained.path: expected weights at {file}, found no file: check the path")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{file} holds something else than tensors, or is damaged ({reason}): nothing else is read from it; where"
            " you trust it, load it with the library it comes from and save its state_dict with safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return (
        {name: value for name, value in found.items() if isinstance(value, Tensor)} if isinstance(found, dict) else {}
    )


def _no_model(config: PretrainedTokenizerConfig, reason: str) -> UserError:
    return UserError(
        f"{config.path} is no VQGAN of {config.library}'s: {reason};"
        " check image_tokenizer.pretrained's library and path"
    )


def _choose_gradients(tokenizer: ImageTokenizer, train: str | None) -> None:
    for name, parameter in tokenizer.named_parameters():
        parameter.requires_grad_(train == "all" or (train == "decoder" and name.startswith("decoder.")))


def _shape(model: VQGANConfig) -> str:
    [book] = model.quantizers
    return f"{model.factor}×{model.factor} pixels a code, {getattr(book, 'codebook_size', 0):,} codes"
