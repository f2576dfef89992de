"""Prompts in, images out:

    pipeline = Pipeline.from_pretrained("runs/openmoji")
    images = pipeline.generate(["red heart", "blue cat"], candidates=4, seed=7)     # 8 PIL images
    images = pipeline.generate(["red heart"], candidates=64, keep=4)                # the reranker's best 4

`from_pretrained` takes a run directory whose transformer stage is finished, or what `smalti export` made of one.
`docs/sampling.md` is the manual.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.errors import UserError
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.reranker import Ranker
from pipeline.sampling.checks import check_prompts, check_sampling, warn_of_prompts
from pipeline.sampling.decode import candidate_uniforms, draw_codes, log_likelihood
from pipeline.sampling.image_prompt import ImagePrompt, known_codes
from pipeline.sampling.model_source import Source, open_source
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class GeneratedImage:
    """An image, and what it came from."""

    image: Image.Image
    prompt: int  # index of its prompt, from `first_prompt` on
    candidate: int
    score: float | None = None  # the reranker's: 100 cos(image, prompt); of a filled image without one, log p


class Pipeline:
    """The models that together generate a prompt.

    Attributes:
        text_tokenizer, transformer, image_tokenizer: as trained, in eval mode.
        ranker: scores images against prompts; None where the run has no reranker.
        source: where the models came from: hash, default sampling, whether guidance was trained.
    """

    def __init__(
        self,
        text_tokenizer: TextTokenizer,
        transformer: Transformer,
        image_tokenizer: ImageTokenizer,
        ranker: Ranker | None = None,
        source: Source | None = None,
    ) -> None:
        expected = Layout.of(text_tokenizer.text_length, text_tokenizer.vocab_size, image_tokenizer.levels)
        if transformer.layout != expected:
            raise UserError(
                f"the transformer was trained with other tokenizers: it expects {transformer.layout}, "
                f"found {expected}; run the stages tokenize and transformer again"
            )
        self.text_tokenizer, self.transformer, self.image_tokenizer = text_tokenizer, transformer, image_tokenizer
        self.ranker, self.source = ranker, source or Source()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, device: torch.device | str = "cpu", reranker: str | Path | None = None
    ) -> Pipeline:
        """Load a run directory (runs/<name>), or a folder that `smalti export` wrote.

        Args:
            reranker: a folder with a pretrained CLIP that takes the place of the run's own reranker.

        Raises:
            UserError: no such directory, or a stage of the run that is not finished.
        """
        source = open_source(Path(directory))
        device = torch.device(device)
        text_tokenizer = TextTokenizer.from_pretrained(source.text_tokenizer)
        ranker = None
        if reranker or source.reranker:
            ranker = Ranker.from_pretrained(Path(reranker or source.reranker or ""), text_tokenizer, device)
        return cls(
            text_tokenizer,
            Transformer.from_pretrained(source.transformer).to(device),
            ImageTokenizer.from_pretrained(source.image_tokenizer).to(device).eval(),
            ranker,
            source,
        )

    def generate(
        self,
        prompts: Sequence[str],
        candidates: int = 1,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        *,
        keep: int | None = None,
        image_prompt: ImagePrompt | None = None,
        batch_size: int = 64,
        first_prompt: int = 0,
        compiled: bool = False,
        on_tokens: Callable[[int], object] | None = None,
        on_row: Callable[[Tensor, int], object] | None = None,
    ) -> list[GeneratedImage]:
        """Generate every prompt `candidates` times; the images come prompt by prompt.

        Image j of prompt i is a function of (seed, first_prompt + i, j), the prompt, the image prompt and `sampling`
        alone: batch size, other prompts, and how many candidates there are never change it.

        Args:
            prompts: some text each; a longer one than the window is cut, with a warning.
            candidates: images drawn a prompt.
            sampling: how; None: the model's own distribution.
            keep: images kept of each prompt's candidates, best first: those that the reranker finds nearest to the
                prompt; of filled images without a reranker, those that make what stays behind the hole likeliest.
            image_prompt: an image that all prompts start from.
            batch_size: images drawn at once.
            first_prompt: the number of the first prompt, for a job that generates a slice of a longer list.
            compiled: run the step through `torch.compile` (see docs/sampling.md for when that pays).
            on_tokens: called with the number of codes that have been added, over all images.
            on_row: called with the codes [B, N] and how many of the N are drawn, after each row of codes.

        Raises:
            UserError: see `checks.py`; `keep` without a way to rank; an image prompt that does not fit.
        """
        sampling = sampling or SamplingConfig()
        check_prompts(prompts)
        if candidates < 1 or batch_size < 1:
            raise UserError(f"candidates and batch_size must be at least 1, found {candidates} and {batch_size}")
        check_sampling(sampling, self.transformer.layout, self.source.guidance_trained)
        self._check_keep(keep, candidates, image_prompt)
        warn_of_prompts(prompts, self.text_tokenizer)
        model = self._transformer_in(_DTYPES[sampling.dtype])
        device = model.head.weight.device
        text_PT = self.text_tokenizer.encode(prompts).to(device)
        known_N = known_codes(self.image_tokenizer, image_prompt, device) if image_prompt else None
        pairs = [(i, j) for i in range(len(prompts)) for j in range(candidates)]
        found: list[GeneratedImage] = []
        for begin in range(0, len(pairs), batch_size):
            batch = pairs[begin : begin + batch_size]
            uniforms = torch.stack(
                [candidate_uniforms(seed, first_prompt + i, j, model.layout.image_length) for i, j in batch]
            )
            used = sorted({i for i, _ in batch})
            prompt_of_B = torch.tensor([used.index(i) for i, _ in batch], device=device)
            codes_BN = draw_codes(
                *(model, text_PT[used], prompt_of_B, uniforms.to(device), sampling),
                known_PN=None if known_N is None else known_N.expand(len(used), -1),
                on_code=_reporter(model.layout, len(batch), on_tokens, on_row),
                compiled=compiled,
            )
            images = self.decode(codes_BN)
            scores = self._scores(images, batch, prompts, codes_BN, text_PT, known_N) if keep else [None] * len(batch)
            found += [
                GeneratedImage(image, first_prompt + i, j, score)
                for (i, j), image, score in zip(batch, images, scores, strict=True)
            ]
            if keep:  # only the best so far of each prompt stay in memory
                found = best(found, keep)
        return found

    def decode(self, codes_BN: Tensor) -> list[Image.Image]:
        """Codes of all levels (no offsets) to 8-bit RGB images."""
        levels = list(codes_BN.split([level.positions for level in self.transformer.layout.levels], dim=1))
        with torch.inference_mode():
            images = self.image_tokenizer.decode(levels)  # [B, 3, H, W] in [0, 1]
        arrays = images.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    def _transformer_in(self, dtype: torch.dtype) -> Transformer:
        """The transformer in another precision is a copy, so that the original never loses bits."""
        if self.transformer.head.weight.dtype == dtype:
            return self.transformer
        return deepcopy(self.transformer).to(dtype)

    def _check_keep(self, keep: int | None, candidates: int, image_prompt: ImagePrompt | None) -> None:
        if keep is None:
            return
        if not 1 <= keep <= candidates:
            raise UserError(f"keep: expected 1 to {candidates}, the number of candidates, found {keep}")
        if self.ranker is None and not (image_prompt and image_prompt.mask):
            raise UserError(
                "keep: this run has no reranker to tell which candidates are best: train one (reranker.enabled=true),"
                " or give a pretrained CLIP's folder as the reranker"
            )

    def _scores(
        self,
        images: list[Image.Image],
        batch: list[tuple[int, int]],
        prompts: Sequence[str],
        codes_BN: Tensor,
        text_PT: Tensor,
        known_N: Tensor | None,
    ) -> list[float]:
        rows = [i for i, _ in batch]
        if self.ranker is not None:
            return self.ranker.scores(images, [prompts[i] for i in rows])
        assert known_N is not None
        return log_likelihood(self.transformer, text_PT[rows], codes_BN, known_N).tolist()


def best(generated: Sequence[GeneratedImage], keep: int) -> list[GeneratedImage]:
    """The `keep` images of each prompt that score highest, best first; of equals, the earlier candidate."""
    by_prompt: dict[int, list[GeneratedImage]] = {}
    for one in generated:
        by_prompt.setdefault(one.prompt, []).append(one)
    kept: list[GeneratedImage] = []
    for own in by_prompt.values():
        kept += sorted(own, key=lambda one: (-(one.score or 0.0), one.candidate))[:keep]
    return kept


def _reporter(
    layout: Layout,
    rows: int,
    on_tokens: Callable[[int], object] | None,
    on_row: Callable[[Tensor, int], object] | None,
) -> Callable[[int, Tensor], None]:
    reported = 0

    def report(there: int, codes_BN: Tensor) -> None:
        nonlocal reported
        if on_tokens is not None:
            on_tokens(rows * (there - reported))
        reported = there
        level = layout.level_at(there - 1)
        if on_row is not None and (there - layout.level_starts[level]) % layout.levels[level].width == 0:
            on_row(codes_BN, there)

    return report
