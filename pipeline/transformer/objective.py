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
from torch import Tensor, nn

from pipeline.config.transformer import TransformerConfig
from pipeline.text_tokenizer.bpe import PAD_ID
from pipeline.transformer.functional import cross_entropy
from pipeline.transformer.model import Transformer


class JointObjective(nn.Module):
    """`forward(batch, step) -> (loss, metrics)` for `pipeline.training.trainer.train`."""

    def __init__(self, transformer: Transformer, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer, self.config = transformer, config

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`batch`: "text" int64 [B, T], "codes" int64 [B, N]. In training mode captions are dropped.

        In eval mode the metrics hold accuracy/image (another product with the head), bits/image_token, and,
        as a vector [T + N], loss/position: the mean loss of each position of the sequence.
        """
        text_BT, codes_BN = batch["text"], batch["codes"]
        if self.training:
            text_BT = drop_captions(text_BT, self.config.caption_dropout)
        factors = self.transformer.factors(text_BT, codes_BN)
        targets = [text_BT, *codes_BN.split([hidden.shape[1] for hidden, _ in factors[1:]], dim=1)]
        # Of each target [B, n], in float32: what is minimised, and the cross-entropy alone.
        smoothing, z_loss = (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)
        totals, plain = zip(
            *(cross_entropy(*pair, target, smoothing, z_loss) for pair, target in zip(factors, targets, strict=True)),
            strict=True,
        )
        image_total, image_losses = torch.cat(totals[1:], dim=1), torch.cat(plain[1:], dim=1)
        loss = self.config.text_loss_weight * totals[0].mean() + self.config.image_loss_weight * image_total.mean()
        with torch.no_grad():
            image_loss = image_losses.mean()
            metrics = {"loss/text": plain[0].mean(), "loss/image": image_loss}
            if len(factors) > 2:
                metrics |= {f"loss/image/{level}": part.mean() for level, part in enumerate(plain[1:])}
            if not self.training:
                predicted = torch.cat([(hidden @ weight.T).argmax(-1) for hidden, weight in factors[1:]], dim=1)
                metrics["accuracy/image"] = (predicted == codes_BN).float().mean()
                metrics["bits/image_token"] = image_loss / math.log(2)
                metrics["loss/position"] = torch.cat([plain[0].mean(dim=0), image_losses.mean(dim=0)])
        return loss, metrics


def drop_captions(text_BT: Tensor, share: float) -> Tensor:
    """Replace each caption by pads with probability `share` (Ho & Salimans 2022); torch's global RNG."""
    if share == 0:
        return text_BT
    dropped_B1 = torch.rand(len(text_BT), 1, device=text_BT.device) < share
    return text_BT.masked_fill(dropped_B1, PAD_ID)
