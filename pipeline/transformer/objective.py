"""The training loss: next-token cross-entropy of text and image, weighted (Ramesh et al. 2021, section 2.2).

loss = text_loss_weight * mean over B*T text targets + image_loss_weight * mean over B*N code targets,
in nats. Pads count as targets (id 0): the first one tells where the caption ends, the rest cost
nothing, and a fixed denominator keeps the mean over processes the mean over samples.

Options, in training only: label smoothing (Szegedy et al. 2016) over the part's own vocabulary; z-loss
(Chowdhery et al. 2022, section 5), z_loss * log(Z)^2, which holds the logits in bounds. The metrics
`loss/...` are the plain cross-entropy either way.
"""

from __future__ import annotations

import math

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
        """`batch`: "text" int64 [B, T], "codes" int64 [B, N]. In training mode captions are dropped.

        In eval mode the metrics hold accuracy/image (5 % of a step, so not in training), bits/image_token, and,
        as a vector [T + N], loss/position: the mean loss of each position of the sequence.
        """
        text_BT, codes_BN = batch["text"], batch["codes"]
        if self.training:
            text_BT = drop_captions(text_BT, self.config.caption_dropout)
        text_logits, level_logits = self.transformer(text_BT, codes_BN)
        targets = codes_BN.split([logits.shape[1] for logits in level_logits], dim=1)
        text_losses, text_extra = self._losses(text_logits, text_BT)
        parts = [self._losses(logits, target) for logits, target in zip(level_logits, targets, strict=True)]
        text_loss = text_losses.mean()
        losses = torch.cat([part for part, _ in parts], dim=1)
        image_loss = losses.mean()
        loss = self.config.text_loss_weight * text_loss + self.config.image_loss_weight * image_loss
        if text_extra is not None:
            image_extra = torch.cat([extra for _, extra in parts if extra is not None], dim=1)
            loss = loss + self.config.text_loss_weight * text_extra.mean()
            loss = loss + self.config.image_loss_weight * image_extra.mean()
        with torch.no_grad():
            metrics = {"loss/text": text_loss.detach(), "loss/image": image_loss.detach()}
            if len(parts) > 1:
                metrics |= {f"loss/image/{level}": part.detach().mean() for level, (part, _) in enumerate(parts)}
            if not self.training:
                pairs = zip(level_logits, targets, strict=True)
                hits = torch.cat([logits.argmax(-1) == target for logits, target in pairs], dim=1)
                metrics["accuracy/image"] = hits.float().mean()
                metrics["bits/image_token"] = image_loss / math.log(2)
                metrics["loss/position"] = torch.cat([text_losses.mean(dim=0), losses.mean(dim=0)])
        return loss, metrics

    def _losses(self, logits_BSV: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of each target [B, S], in float32: the cross-entropy, and what the options of training add to it."""
        logits_BSV = logits_BSV.float()
        smoothing, z_loss = self.config.label_smoothing, self.config.z_loss
        if not self.training or not (smoothing or z_loss):
            losses = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none")
            return losses.view_as(targets_BS), None
        log_z = logits_BSV.logsumexp(dim=-1)
        losses = log_z - logits_BSV.gather(-1, targets_BS[..., None])[..., 0]
        # The loss against the uniform distribution, of which label smoothing mixes in a share.
        uniform = log_z - logits_BSV.mean(dim=-1)
        return losses, smoothing * (uniform - losses) + z_loss * log_z.square()


def drop_captions(text_BT: Tensor, share: float) -> Tensor:
    """Replace each caption by pads with probability `share` (Ho & Salimans 2022); torch's global RNG."""
    if share == 0:
        return text_BT
    dropped_B1 = torch.rand(len(text_BT), 1, device=text_BT.device) < share
    return text_BT.masked_fill(dropped_B1, PAD_ID)
