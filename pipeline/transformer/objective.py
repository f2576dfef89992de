"""The training loss: next-token cross-entropy of text and image, weighted (Ramesh et al. 2021, section 2.2).

loss = text_loss_weight * mean over B*T text targets + image_loss_weight * mean over B*N code targets,
in nats. Pads count as targets (id 0): the first one tells where the caption ends, the rest cost
nothing, and a fixed denominator keeps the mean over processes the mean over samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.text_tokenizer import PAD_ID
from pipeline.transformer.config import TransformerConfig
from pipeline.transformer.model import Transformer


class JointObjective(nn.Module):
    """`forward(batch, step) -> (loss, metrics)` for `pipeline.loop.train`."""

    def __init__(self, transformer: Transformer, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer, self.config = transformer, config

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: "text" int64 [B, T], "codes" int64 [B, N]. In training mode captions are dropped."""
        text_BT, codes_BN = batch["text"], batch["codes"]
        if self.training:
            text_BT = drop_captions(text_BT, self.config.caption_dropout)
        text_logits, level_logits = self.transformer(text_BT, codes_BN)
        text_loss = _cross_entropy(text_logits, text_BT).mean()
        targets = codes_BN.split([logits.shape[1] for logits in level_logits], dim=1)
        losses = [_cross_entropy(logits, target) for logits, target in zip(level_logits, targets, strict=True)]
        image_loss = torch.cat(losses, dim=1).mean()
        loss = self.config.text_loss_weight * text_loss + self.config.image_loss_weight * image_loss
        with torch.no_grad():
            pairs = zip(level_logits, targets, strict=True)
            hits = torch.cat([logits.argmax(-1) == target for logits, target in pairs], dim=1)
            metrics = {"loss/text": text_loss.detach(), "loss/image": image_loss.detach()}
            if len(losses) > 1:
                metrics |= {f"loss/image/{level}": part.detach().mean() for level, part in enumerate(losses)}
            metrics["accuracy/image"] = hits.float().mean()
        return loss, metrics


def drop_captions(text_BT: Tensor, share: float) -> Tensor:
    """Replace each caption by pads with probability `share` (Ho & Salimans 2022); torch's global RNG."""
    if share == 0:
        return text_BT
    dropped_B1 = torch.rand(len(text_BT), 1, device=text_BT.device) < share
    return text_BT.masked_fill(dropped_B1, PAD_ID)


def _cross_entropy(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Loss of each target [B, S], in float32 whatever the model's precision."""
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), reduction="none").view_as(targets_BS)
