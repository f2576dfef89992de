"""Prompts in, images out:

    pipeline = Pipeline.from_pretrained("runs/openmoji")
    generated = pipeline.generate(["red heart", "blue cat"], candidates=4, seed=7)     # 8 images, prompt by prompt
    generated[0].image.save("heart.png")
    pipeline.generate(["red heart"], candidates=64, keep=4)                            # the reranker's best 4

`from_pretrained` takes a run directory whose transformer stage is finished, or what `smalti export` made of one.
`docs/sampling.md` is the manual.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core.arithmetic import cpu_has_bf16
from pipeline.core.errors import UserError
from pipeline.core.image_io import to_pil
from pipeline.core.image_size import images_at_once
from pipeline.core.pretrained import cast
from pipeline.image_tokenizer import ImageTokenizer
from pipeline.reranker import Ranker
from pipeline.sampling.batch_memory import batch_that_fits, bytes_per_image, free_bytes, in_batches
from pipeline.sampling.checks import (
    check_compiler,
    check_counts,
    check_prompts,
    check_rankable,
    check_sampling,
    warn_of_prompts,
)
from pipeline.sampling.decode import behind_hole, candidate_uniforms, draw_codes, log_likelihood, numbers_per_image
from pipeline.sampling.image_prompt import ImagePrompt, known_codes
from pipeline.sampling.model_source import ModelSource, find_models
from pipeline.sampling.packed import packed
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.build import load_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer

log = logging.getLogger(__name__)
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Candidate = tuple[int, int]  # index of the prompt in the call, and of the candidate


@dataclass(frozen=True)
class GeneratedImage:
    """An image, and what it came from."""

    image: Image.Image
    prompt: int  # index of its prompt, from `first_prompt` on
    candidate: int
    score: float | None = None  # the reranker's: 100 cos(image, prompt); for a filled image without one, log p


@dataclass(frozen=True)
class Callbacks:
    """What `Pipeline.generate` calls while it draws codes."""

    on_tokens: Callable[[int], object] | None = None  # with the number of codes that have been added, over all images
    on_row: Callable[[Tensor, int], object] | None = None  # with the codes [B, N] and how many of the N are there,
    # after each row of codes; of transformers of other orders than raster after each pass


class Pipeline:
    """The models that together turn a prompt into images.

    Attributes:
        text_tokenizer, transformer, image_tokenizer: as trained, in eval mode.
        ranker: scores images against prompts; None where the run has no reranker.
        source: where the models came from: hash, default sampling, whether guidance was trained.

    The transformer generates in the precision in which it was loaded; image tokenizer and ranker are in float32.
    """

    def __init__(
        self,
        text_tokenizer: TextTokenizer,
        transformer: Transformer,
        image_tokenizer: ImageTokenizer,
        ranker: Ranker | None = None,
        source: ModelSource | None = None,
    ) -> None:
        expected = Layout.of(text_tokenizer.text_length, text_tokenizer.vocab_size, image_tokenizer.levels)
        if transformer.layout != expected:
            raise UserError(
                f"the transformer was trained with other tokenizers: it expects {transformer.layout}, "
                f"found {expected}; run the stages tokenize and transformer again"
            )
        self.text_tokenizer, self.transformer, self.image_tokenizer = text_tokenizer, transformer, image_tokenizer
        self.ranker, self.source = ranker, source or ModelSource()
        self._narrower: Transformer | None = None  # the transformer cast, once, for calls that ask for it
        self._fast: tuple[list[int], Transformer] | None = None  # packed, and the versions of what was packed

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        device: torch.device | str = "cpu",
        reranker: str | Path | None = None,
        dtype: torch.dtype | None = None,
        step: int | None = None,
    ) -> Pipeline:
        """Load a run directory (runs/<name>), or a folder that `smalti export` wrote.

        Args:
            reranker: a folder with a pretrained CLIP that takes the place of the run's own reranker.
            dtype: of the transformer, which is cast while it loads; None: the run's `generate.sampling.dtype`.
            step: of a run, the transformer as it was after this many steps; None: the finished one.

        Raises:
            UserError: no such directory, or a stage of the run that is not finished.
        """
        source = find_models(Path(directory), step)
        device = torch.device(device)
        dtype = dtype or sampling_dtype(source.sampling.dtype, device)
        text_tokenizer = TextTokenizer.from_pretrained(source.text_tokenizer)
        ranker = None
        if reranker or source.reranker:
            ranker = Ranker.from_pretrained(Path(reranker or source.reranker or ""), text_tokenizer, device)
        return cls(
            text_tokenizer,
            load_transformer(source.transformer, dtype, device),
            ImageTokenizer.from_pretrained(source.image_tokenizer, device=device),
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
        first_prompt: int = 0,
        batch_size: int = 64,
        compiled: bool = False,
        callbacks: Callbacks | None = None,
    ) -> list[GeneratedImage]:
        """Generate `candidates` images per prompt; they come prompt by prompt.

        Image j of prompt i is a function of (seed, first_prompt + i, j), the prompt, the image prompt and `sampling`
        alone: batch size, other prompts, and how many candidates there are never change it.

        Args:
            prompts: some text each; a longer one than the window is cut, with a warning.
            candidates: images drawn per prompt.
            sampling: how codes are drawn; None: from the model's own distribution.
            keep: images kept of each prompt's candidates, best first: those that the reranker finds nearest to the
                prompt; for filled images without a reranker, those that make what stays behind the hole likeliest.
            image_prompt: an image that all prompts start from.
            first_prompt: the number of the first prompt, for a job that generates a slice of a longer list.
            batch_size: images drawn at once; on a GPU fewer if they do not fit, with a warning.
            compiled: run the step through `torch.compile` (see docs/sampling.md for when that pays).

        Raises:
            UserError: see `checks.py`; an image prompt that does not fit; GPU memory for less than an image.
        """
        sampling = sampling or SamplingConfig()
        self._check(prompts, candidates, batch_size, sampling, keep, image_prompt)
        if compiled:
            check_compiler(self.transformer)
        drawing = self._drawing(prompts, seed, sampling, image_prompt, first_prompt, compiled)
        if keep and self.ranker is None:
            assert drawing.known is not None
            check_rankable(behind_hole(drawing.model, drawing.known))
        wanted = [(i, j) for i in range(len(prompts)) for j in range(candidates)]
        generated: list[GeneratedImage] = []
        batch_size = batch_that_fits(min(batch_size, len(wanted)), drawing.bytes_per_image, free_bytes(drawing.device))
        for batch, codes_BN in in_batches(wanted, batch_size, partial(drawing.codes, callbacks or Callbacks())):
            images = self.decode(codes_BN)
            scores = self._scores(images, codes_BN, batch, prompts, drawing) if keep else [None] * len(batch)
            generated += [
                GeneratedImage(image, first_prompt + i, j, score)
                for (i, j), image, score in zip(batch, images, scores, strict=True)
            ]
            if keep:  # only the best so far of each prompt stay in memory
                generated = keep_best(generated, keep)
        return generated

    def decode(self, codes_BN: Tensor) -> list[Image.Image]:
        """Codes of all levels (no offsets), int64 [B, N], to B 8-bit RGB images, a few at a time."""
        sizes = [level.positions for level in self.transformer.layout.levels]
        at_once = images_at_once(self.image_tokenizer.height, self.image_tokenizer.width)
        images: list[Image.Image] = []
        with torch.inference_mode():
            for part_bN in codes_BN.split(at_once):
                images += to_pil(self.image_tokenizer.decode(list(part_bN.split(sizes, dim=1))))
        return images

    def told(self, sampling: SamplingConfig) -> SamplingConfig:
        """`sampling` as metadata of images has it: with the precision that `auto` stands for here."""
        if sampling.dtype != "auto":
            return sampling
        names = [name for name, dtype in DTYPES.items() if dtype == self.transformer.head.weight.dtype]
        return sampling.model_copy(update={"dtype": names[0]}) if names else sampling

    def _check(
        self,
        prompts: Sequence[str],
        candidates: int,
        batch_size: int,
        sampling: SamplingConfig,
        keep: int | None,
        image_prompt: ImagePrompt | None,
    ) -> None:
        check_prompts(prompts)
        can_rank = self.ranker is not None or (image_prompt is not None and image_prompt.mask is not None)
        check_counts(candidates, batch_size, keep, can_rank)
        check_sampling(sampling, self.transformer.layout, self.transformer.shape, self.source.guidance_trained)
        warn_of_prompts(prompts, self.text_tokenizer)

    def _drawing(
        self,
        prompts: Sequence[str],
        seed: int,
        sampling: SamplingConfig,
        image_prompt: ImagePrompt | None,
        first_prompt: int,
        compiled: bool,
    ) -> _Drawing:
        model = self.fastest(self._transformer_in(sampling.dtype))
        device = model.head.weight.device
        text_PT = self.text_tokenizer.encode(prompts).to(device)
        known_N = known_codes(self.image_tokenizer, image_prompt, device) if image_prompt else None
        return _Drawing(model, text_PT, known_N, sampling, seed, first_prompt, compiled)

    def _transformer_in(self, name: str) -> Transformer:
        """The transformer; in a narrower precision than its own a copy, which is made once.

        Raises:
            UserError: a wider precision, whose bits are not there.
        """
        own = self.transformer.head.weight
        dtype = own.dtype if name == "auto" else sampling_dtype(name, own.device)
        if own.dtype == dtype:
            return self.transformer
        if own.dtype.itemsize < dtype.itemsize:
            raise UserError(
                f"sampling.dtype: expected auto, or the precision that the transformer was loaded in ({own.dtype}),"
                f" found {name}; load it with Pipeline.from_pretrained(…, dtype={dtype})"
            )
        if self._narrower is None:
            self._narrower = cast(self.transformer, dtype)
        return self._narrower

    def fastest(self, model: Transformer) -> Transformer:
        """`model` as it draws fastest here, which is made once, and anew when its weights have changed."""
        weight = model.head.weight
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not cpu_has_bf16():
            _tell_of_slow_bf16()
        versions = [id(model), *(0 if p.is_inference() else p._version for p in model.parameters())]
        if self._fast is None or self._fast[0] != versions:
            self._fast = versions, packed(model)
        return self._fast[1]

    def _scores(
        self,
        images: list[Image.Image],
        codes_BN: Tensor,
        batch: Sequence[Candidate],
        prompts: Sequence[str],
        drawing: _Drawing,
    ) -> list[float]:
        """What the candidates are ranked by, higher is better: the reranker, else the likelihood of what stays."""
        rows = [i for i, _ in batch]
        if self.ranker is not None:
            return self.ranker.scores(images, [prompts[i] for i in rows])
        assert drawing.known is not None
        return log_likelihood(self.transformer, drawing.text[rows], codes_BN, drawing.known).tolist()


@dataclass(frozen=True)
class _Drawing:
    """All that the codes of one call are a function of, beside the candidate's own numbers."""

    model: Transformer
    text: Tensor  # [P, T]
    known: Tensor | None  # [N], the codes of an image prompt
    sampling: SamplingConfig
    seed: int
    first_prompt: int
    compiled: bool

    @property
    def device(self) -> torch.device:
        return self.text.device

    @property
    def bytes_per_image(self) -> int:
        layout, shape = self.model.layout, self.model.shape
        return bytes_per_image(layout, shape, self.model.head.weight.itemsize, self.sampling.guidance != 1)

    def codes(self, callbacks: Callbacks, batch: Sequence[Candidate]) -> Tensor:
        """The codes of these candidates, int64 [B, N]."""
        count, device = numbers_per_image(self.model), self.device
        uniforms = torch.stack([candidate_uniforms(self.seed, self.first_prompt + i, j, count) for i, j in batch])
        used = sorted({i for i, _ in batch})
        return draw_codes(
            self.model,
            self.text[used],
            torch.tensor([used.index(i) for i, _ in batch], device=device),
            uniforms.to(device),
            self.sampling,
            known_PN=None if self.known is None else self.known.expand(len(used), -1),
            on_code=_reporter(self.model, len(batch), callbacks),
            compiled=self.compiled,
        )


def sampling_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision that `generate.sampling.dtype` names: `auto` is bf16 on GPUs that compute in it, else float32.

    Raises:
        UserError: bf16 on a GPU that does not compute in it.
    """
    can = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return torch.bfloat16 if can else torch.float32
    if name == "bf16" and device.type == "cuda" and not can:
        raise UserError(
            f"sampling.dtype: expected fp32 or auto, since {torch.cuda.get_device_name(device)} does not compute in"
            " bf16, found bf16"
        )
    return DTYPES[name]


@cache  # once a process
def _tell_of_slow_bf16() -> None:
    log.warning("sampling in bf16 on a CPU without products in bf16: drawing takes longer than with dtype=fp32")


def keep_best(generated: Sequence[GeneratedImage], keep: int) -> list[GeneratedImage]:
    """The `keep` images of each prompt that score highest, best first; among equals, the earlier candidate."""
    by_prompt: dict[int, list[GeneratedImage]] = {}
    for one in generated:
        by_prompt.setdefault(one.prompt, []).append(one)
    kept: list[GeneratedImage] = []
    for own in by_prompt.values():
        kept += sorted(own, key=lambda one: (-(one.score or 0.0), one.candidate))[:keep]
    return kept


def _reporter(model: Transformer, images: int, callbacks: Callbacks) -> Callable[[int, Tensor], None]:
    """What `draw_codes` calls after each code of a batch of `images`."""
    layout, reported = model.layout, 0

    def report(drawn: int, codes_BN: Tensor) -> None:
        nonlocal reported
        if callbacks.on_tokens is not None:
            callbacks.on_tokens(images * (drawn - reported))
        reported = drawn
        level = layout.level_at(drawn - 1)
        row_is_full = (drawn - layout.level_starts[level]) % layout.levels[level].width == 0
        if callbacks.on_row is not None and (row_is_full or model.order != "raster"):
            callbacks.on_row(codes_BN, drawn)

    return report
