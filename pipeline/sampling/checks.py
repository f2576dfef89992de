"""Checks of prompts and settings, made before anything is generated."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core.compiler import missing_compiler
from pipeline.core.errors import UserError
from pipeline.core.text import clean_text, visible
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

log = logging.getLogger(__name__)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError unless `prompts` is a non-empty list of non-empty strings."""
    if isinstance(prompts, str) or not prompts:
        raise UserError(f"expected a list of at least one prompt, found {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not clean_text(prompt):
            raise UserError(f"prompt {index}: expected some text, found {prompt!r}: write what the image should show")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {index}: expected Unicode text, found half a character ({error.reason})"
            ) from error


def check_counts(candidates: int, batch_size: int, keep: int | None, can_rank: bool) -> None:
    """Raises UserError for less than one image, or for a `keep` that cannot be had: too many, or nothing that ranks."""
    if candidates < 1 or batch_size < 1:
        raise UserError(f"candidates and batch_size must be at least 1, found {candidates} and {batch_size}")
    if keep is None:
        return
    if not 1 <= keep <= candidates:
        raise UserError(f"keep: expected 1 to {candidates}, the number of candidates, found {keep}")
    if not can_rank:
        raise UserError(
            "keep: this run has no reranker to tell which candidates are best: train one (reranker.enabled=true),"
            " or give a pretrained CLIP's folder as the reranker"
        )


def check_rankable(behind_N: Tensor) -> None:
    """Raises UserError if no known code lies behind the hole (`behind_hole`) to tell its candidates apart."""
    if not behind_N.any():
        raise UserError(
            "keep: expected something that stays behind the hole, which the candidates are ranked by without a"
            " reranker, found nothing: give a reranker, or leave keep out"
        )


def check_sampling(sampling: SamplingConfig, layout: Layout, shape: TransformerShape, guidance_trained: bool) -> None:
    """Raises UserError for settings that this model cannot follow: too large a top_k, guidance that was not trained,
    what is for models of another order, or more or less passes than its codes and levels allow."""
    if wrong := sampling.not_followed_by(shape.order):
        raise UserError(wrong)
    if shape.code_groups > 1 and sampling.speculate is not None:
        raise UserError("speculate: expected a transformer without code_groups, which draws digits: leave it out")
    fewest, most = len(layout.levels), layout.image_length
    if sampling.passes is not None and not fewest <= sampling.passes <= most:
        raise UserError(
            f"passes: expected {fewest} to {most}, one for each level to one for each code, found {sampling.passes}"
        )
    codes = max(level.codebook_size for level in layout.levels)
    if sampling.top_k is not None and sampling.top_k > codes:
        raise UserError(f"top_k: expected at most the {codes} codes of the image tokenizer, found {sampling.top_k}")
    if sampling.guidance != 1 and not guidance_trained:
        raise UserError(
            f"guidance {sampling.guidance:g} needs a transformer trained with transformer.caption_dropout above 0;"
            " this one was not: train it again, or leave guidance at 1"
        )


def check_sampling_of(config: PipelineConfig, layout: Layout) -> None:
    """`check_sampling` of all that a pipeline will generate with, before its transformer is trained for days."""
    own, sweep = config.generate.sampling, config.evaluate.sweep
    settings = [("generate.sampling", own)]
    settings += [
        ("evaluate.sweep", own.model_copy(update={"top_k": top_k})) for top_k in (sweep.top_k if sweep else [])
    ]
    for section, sampling in settings:
        try:
            check_sampling(sampling, layout, config.transformer, config.transformer.caption_dropout > 0)
        except UserError as error:
            raise UserError(f"{section}.{error}") from error


def check_compiler(model: Transformer) -> None:
    """Raises UserError if torch.compile cannot compile the step of `model` here."""
    if model.order != "raster":
        raise UserError(
            f"--compile (generate.compile): expected a transformer of order raster, found {model.order}: leave it out"
        )
    if model.shape.code_groups > 1:
        raise UserError("--compile (generate.compile): expected a transformer without code_groups: leave it out")
    device = model.head.weight.device
    if missing := missing_compiler(device):
        raise UserError(f"--compile (generate.compile): expected {missing}, found none: install it, or leave it out")


def warn_of_prompts(prompts: Sequence[str], tokenizer: TextTokenizer) -> None:
    """Log a warning about prompts that are cut, and one about prompts without a word."""
    window = tokenizer.text_length
    cut = [p for p, n in zip(prompts, tokenizer.token_counts(prompts), strict=True) if n > window]
    if cut:
        log.warning(
            "%d of %d prompts are longer than the window of %d tokens and were cut; shorten them, the first: '%s'",
            len(cut),
            len(prompts),
            window,
            _short(cut[0]),
        )
    wordless = [p for p in prompts if not any(character.isalnum() for character in p)]
    if wordless:
        log.warning(
            "%d of %d prompts hold no letter or digit, and captions are words: write some; the first: '%s'",
            len(wordless),
            len(prompts),
            _short(wordless[0]),
        )


def _short(prompt: str, limit: int = 200) -> str:
    return visible(prompt if len(prompt) <= limit else prompt[:limit] + "…")
