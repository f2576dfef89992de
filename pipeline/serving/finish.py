"""From codes to files, in a thread of its own: the image tokenizer and the reranker, one image at a time.

An image is decoded alone, so its pixels depend on nobody else's; its file is that of `smalti generate RUN PROMPT`.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from pipeline.core.image_io import png_bytes
from pipeline.sampling.draw_next import UNKNOWN
from pipeline.sampling.image_prompt import ImagePrompt, known_codes
from pipeline.sampling.pipeline import GeneratedImage, Pipeline, keep_best
from pipeline.sampling.save import png_file
from pipeline.sampling.to_directory import GenerateJob
from pipeline.serving.order import Failed, Finished, Made, Order, Partial
from pipeline.serving.refusal import broken

log = logging.getLogger(__name__)


class Finisher:
    """Makes the files of orders; of images that are still drawn only as many as it keeps up with."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._worker = ThreadPoolExecutor(1, "finish")
        self._shown: Future[None] | None = None

    def known_codes(self, image_prompt: ImagePrompt) -> Future[Tensor]:
        """Of an image prompt, on the CPU."""
        device = self._pipeline.transformer.head.weight.device
        return self._worker.submit(lambda: known_codes(self._pipeline.image_tokenizer, image_prompt, device).cpu())

    def show(self, order: Order) -> None:
        """Tell of the images as far as they are; not while the ones before are still on their way."""
        if self._shown is None or self._shown.done():
            codes = [row.codes.clone() for row in order.rows]
            self._shown = self._worker.submit(self._show, order, codes, order.partials - 1)

    def finish(self, order: Order) -> None:
        """Tell of the finished images."""
        self._worker.submit(self._finish, order)

    def close(self) -> None:
        """Wait until all is told."""
        self._worker.shutdown()

    def _show(self, order: Order, codes: list[Tensor], index: int) -> None:
        if order.cancelled:
            return
        try:
            for candidate, own in enumerate(codes):
                device = self._pipeline.transformer.head.weight.device
                image = self._pipeline.decode(own.clamp(min=0)[None].to(device))[0]
                order.emit(Partial(png_bytes(self._as_far_as(image, own != UNKNOWN)), candidate, index))
        except Exception:
            log.exception("an image could not be shown while it is drawn")

    def _as_far_as(self, image: Image.Image, there_N: Tensor) -> Image.Image:
        """What is generated: where codes of the finest level are there; all of it while only coarser ones are."""
        *coarser, finest = self._pipeline.transformer.layout.levels
        cells = there_N[-finest.positions :]
        if coarser and not bool(cells.any()):
            return image
        grid = Image.fromarray((cells.view(finest.height, finest.width).numpy() * 255).astype("uint8"))
        shown = image.convert("RGBA")
        shown.putalpha(grid.resize(image.size, Image.Resampling.NEAREST))
        return shown

    def _finish(self, order: Order) -> None:
        if order.cancelled:
            return
        try:
            with torch.inference_mode():
                order.emit(Finished(self._made(order)))
        except Exception:
            log.exception("an image could not be decoded")
            order.emit(Failed(broken()))

    def _made(self, order: Order) -> list[Made]:
        pipeline, device = self._pipeline, self._pipeline.transformer.head.weight.device
        images = [pipeline.decode(row.codes[None].to(device))[0] for row in order.rows]
        scores: list[float] | list[None] = [None] * order.n
        if order.ranked and pipeline.ranker is not None:
            scores = pipeline.ranker.scores(images, [order.prompt] * order.n)
        generated = [GeneratedImage(image, 0, j, scores[j]) for j, image in enumerate(images)]
        if order.ranked:
            generated = keep_best(generated, order.n)
        keep = order.n if order.ranked else None
        job = GenerateJob([order.prompt], order.n, keep, order.seed, order.sampling, None, order.image_prompt)
        made = []
        for one in generated:
            metadata = job.metadata(0, pipeline) | {"candidate": one.candidate}
            score = None if one.score is None else round(one.score, 4)
            if score is not None:
                metadata["score"] = score
            codes = order.rows[one.candidate].codes.tolist()
            made.append(Made(png_file(one.image, metadata), one.candidate, codes, score))
        return made
