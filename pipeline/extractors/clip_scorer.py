"""A pretrained CLIP as a scorer of images by their captions: it embeds both into one space.

scorer = ClipScorer("clip-folder", device)
clip_scores(scorer.images(images).features, scorer.captions(captions))        # metrics/clip_score.py
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.extractors.hf import read_model


class ClipScorer:
    """Both towers of a CLIP.

    Attributes:
        images: the extractor of image embeddings.
    """

    def __init__(self, weights: str, device: torch.device, batch_size: int = 64) -> None:
        """Reads the folder or cached name `weights`. Raises UserError when it is no CLIP, or lacks its tokenizer."""
        from transformers import AutoTokenizer, CLIPModel

        from pipeline.extractors.clip import clip_images

        folder, model = read_model(CLIPModel, "clip", weights, "evaluate.clip", "evaluate.clip")
        self.images = clip_images(folder, model, device, batch_size)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"evaluate.clip {folder}: expected the model's tokenizer beside it, found none; save it there"
            ) from error
        self._text_model = model.text_model.to(device)
        self._text_projection = model.text_projection.to(device)
        self._length = model.text_model.config.max_position_embeddings
        self._device, self._batch_size = device, batch_size

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """Embeddings float32 `[n, dimensions]`; captions longer than the model's window are cut."""
        found = []
        for start in range(0, len(captions), self._batch_size):
            tokens = self._tokenizer(
                list(captions[start : start + self._batch_size]),
                padding=True,
                truncation=True,
                max_length=self._length,
                return_tensors="pt",
            ).to(self._device)
            output = self._text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            found.append(self._text_projection(output.pooler_output).float().cpu())
        return torch.cat(found)
