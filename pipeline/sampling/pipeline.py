"""Prompts in, pictures out:

    pipeline = Pipeline.from_pretrained("runs/openmoji")
    pictures = pipeline.generate(["red heart", "blue cat"], candidates=4, seed=7)     # 8 PIL images

`from_pretrained` takes a run directory whose transformer stage is finished.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import UserError
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.sampling.config import SamplingConfig
from pipeline.sampling.decode import candidate_uniforms, draw_codes
from pipeline.text_tokenizer import TextTokenizer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Pipeline:
    """The three models that together paint a prompt."""

    def __init__(
        self, text_tokenizer: TextTokenizer, transformer: Transformer, image_tokenizer: ImageTokenizer
    ) -> None:
        expected = Layout.of(text_tokenizer.text_length, text_tokenizer.vocab_size, image_tokenizer.levels)
        if transformer.layout != expected:
            raise UserError(
                f"the transformer was trained with other tokenizers: it expects {transformer.layout}, "
                f"found {expected}; run the stages tokenize and transformer again"
            )
        self.text_tokenizer, self.transformer, self.image_tokenizer = text_tokenizer, transformer, image_tokenizer

    @classmethod
    def from_pretrained(cls, directory: str | Path, device: torch.device | str = "cpu") -> Pipeline:
        """Load from a run directory: text-tokenizer/, image-tokenizer/model/, transformer/model/."""
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"no run directory at {directory}: expected one that `smalti run` made")
        return cls(
            TextTokenizer.from_pretrained(directory / "text-tokenizer"),
            Transformer.from_pretrained(directory / "transformer" / "model").to(device),
            ImageTokenizer.from_pretrained(directory / "image-tokenizer" / "model").to(device).eval(),
        )

    def generate(
        self,
        prompts: Sequence[str],
        candidates: int = 1,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        *,
        batch_size: int = 64,
        first_prompt: int = 0,
        on_pictures: Callable[[int], object] | None = None,
    ) -> list[Image.Image]:
        """Paint every prompt `candidates` times; the pictures come prompt by prompt.

        Picture j of prompt i is a function of (seed, first_prompt + i, j) and the prompt alone: batch size and
        other prompts never change it. `first_prompt` lets a job paint a slice of a longer list. `on_pictures`
        is called with the number of pictures finished by each batch.

        Raises:
            UserError: no prompt, an empty or non-string one, or fewer than one candidate.
        """
        sampling = sampling or SamplingConfig()
        check_prompts(prompts)
        if candidates < 1 or batch_size < 1:
            raise UserError(f"candidates and batch_size must be at least 1, found {candidates} and {batch_size}")
        self._warn_of_cut_prompts(prompts)
        model = self._transformer_in(_DTYPES[sampling.dtype])
        text_PT = self.text_tokenizer.encode(prompts).to(model.head.weight.device)
        pairs = [(i, j) for i in range(len(prompts)) for j in range(candidates)]
        pictures: list[Image.Image] = []
        for begin in range(0, len(pairs), batch_size):
            batch = pairs[begin : begin + batch_size]
            codes_BN = self._draw(model, text_PT, batch, seed, first_prompt, sampling)
            pictures += self.decode(codes_BN)
            if on_pictures is not None:
                on_pictures(len(batch))
        return pictures

    def decode(self, codes_BN: Tensor) -> list[Image.Image]:
        """Codes of all levels (no offsets) to 8-bit RGB pictures."""
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

    def _draw(
        self,
        model: Transformer,
        text_PT: Tensor,
        batch: list[tuple[int, int]],
        seed: int,
        first_prompt: int,
        sampling: SamplingConfig,
    ) -> Tensor:
        count = model.layout.image_length
        uniforms = torch.stack([candidate_uniforms(seed, first_prompt + i, j, count) for i, j in batch])
        used = sorted({i for i, _ in batch})
        prompt_of_B = torch.tensor([used.index(i) for i, _ in batch], device=text_PT.device)
        return draw_codes(model, text_PT[used], prompt_of_B, uniforms.to(text_PT.device), sampling)

    def _warn_of_cut_prompts(self, prompts: Sequence[str]) -> None:
        window = self.text_tokenizer.text_length
        cut = [p for p, n in zip(prompts, self.text_tokenizer.token_counts(prompts), strict=True) if n > window]
        if cut:
            log.warning(
                "%d of %d prompts are longer than the window of %d tokens and were cut, the first: '%s'",
                *(len(cut), len(prompts), window, cut[0]),
            )


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises UserError unless `prompts` is a non-empty list of non-empty strings."""
    if isinstance(prompts, str) or not prompts:
        raise UserError(f"expected a list of at least one prompt, found {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"prompt {index}: expected some text, found {prompt!r}")
