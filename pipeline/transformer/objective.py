"""The training loss: next-token cross-entropy of text and image, weighted (Ramesh et al. 2021, section 2.2).

loss = text_loss_weight * mean over B*T text targets + image_loss_weight * mean over B*N code targets,
in nats. Pads count as targets (id 0): the first one tells where the caption ends, the rest cost
nothing, and a fixed denominator keeps the mean over processes the mean over samples. Captions that are
dropped (`caption_dropout`) are no text to predict: their targets do not count, and the denominator is
B*T times the share that is kept on average.

Options, in training only: label smoothing (Szegedy et al. 2016) over the part's own vocabulary; z-loss
(Chowdhery et al. 2022, section 5), z_loss * log(Z)^2, which holds the logits in bounds. The metrics
`loss/...` are the plain cross-entropy either way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.config.transformer import TransformerConfig
from pipeline.core.objective import Exported, Objective, ParameterGroup
from pipeline.text_tokenizer.bpe import PAD_ID
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.bit_groups import GroupedTransformer, of_codes
from pipeline.transformer.cross_entropy import Part, cross_entropy
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.orders import random_orders


class TransformerObjective(Objective):
    """A transformer and a loss, whatever that is."""

    transformer: Transformer

    def exported(self) -> Exported:
        return Exported("transformer.", self.transformer.exported_config())

    def parameter_groups(self) -> list[ParameterGroup]:
        return self.transformer.parameter_groups()

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer.blocks)

    def attention_layers(self) -> list[nn.Module]:
        return [block.get_submodule("attention") for block in self.transformer.blocks]


class JointObjective(TransformerObjective):
    """The transformer and its loss, for `pipeline.training.trainer.train`."""

    def __init__(self, transformer: Transformer, config: TransformerConfig, seed: int = 0) -> None:
        """`seed`: of the orders that an any-order model learns."""
        super().__init__()
        self.transformer, self.config, self.seed = transformer, config, seed

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss and metrics of `batch`: "text" int64 [B, T], "codes" int64 [B, N].

        In training mode captions are dropped. In eval mode the loss has no gradient, and the metrics hold
        accuracy/image, bits/image_token, and, as a vector [T + N], loss/position: the mean loss of each position (of
        an any-order model: of each place in its order).
        """
        config, training = self.config, self.training
        text_BT, codes_BN = batch["text"], batch["codes"]
        share = config.caption_dropout if training else 0.0
        text_BT, kept_BT = drop_captions(text_BT, share)
        smoothing, z_loss = (config.label_smoothing, config.z_loss) if training else (0.0, 0.0)
        factors, codes_BN = self._factors(text_BT, codes_BN, step)
        targets = [text_BT, *self.transformer.targets(codes_BN)]
        parts = [Part(*own, target) for own, target in zip(factors, targets, strict=True)]
        with torch.set_grad_enabled(training and torch.is_grad_enabled()):
            text = cross_entropy(parts[:1], smoothing, z_loss, kept_BT, text_BT.numel() * (1 - share))
            image = of_codes(cross_entropy(parts[1:], smoothing, z_loss), config.code_groups)
        loss = config.text_loss_weight * text.mean + config.image_loss_weight * image.mean
        with torch.no_grad():
            kept = text.plain[0] if kept_BT is None else text.plain[0] * kept_BT / (1 - share)
            metrics = _loss_metrics(kept, image.plain)
            if not training:
                metrics["accuracy/image"] = torch.cat(image.right, dim=1).float().mean()
                metrics["bits/image_token"] = metrics["loss/image"] / math.log(2)
                metrics["loss/position"] = torch.cat([part.mean(dim=0) for part in (*text.plain, *image.plain)])
        return loss, metrics

    def _factors(self, text_BT: Tensor, codes_BN: Tensor, step: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """The factors of the logits, and the codes in the order in which these predict them."""
        model = self.transformer
        read_BN = replace_codes(codes_BN, model.layout, self.config.noise) if self.training else codes_BN
        if isinstance(model, GroupedTransformer):
            return model.hidden_and_head_weights(text_BT, read_BN, codes_BN), codes_BN
        if not isinstance(model, AnyOrderTransformer):
            return model.hidden_and_head_weights(text_BT, read_BN), codes_BN
        share = self._random_share(step) if self.training else 1.0
        order_BN = random_orders(codes_BN, model.layout, self.seed, step, share)
        factors = model.hidden_and_head_weights(text_BT, read_BN, order_BN)
        return factors, codes_BN.gather(1, order_BN)

    def _random_share(self, step: int) -> float:
        """Of the samples of a step, those whose codes come in a random order and not in raster order (Yu et al. 2024,
        RAR, anneal the other way round)."""
        if self.config.order_anneal is None:
            return 1.0
        begin, end = self.config.order_anneal
        return min(max((step - begin) / (end - begin), 0.0), 1.0)


def _loss_metrics(text_losses: Tensor, level_losses: list[Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropy of text [B, T], of all codes, and of each level [B, n] where there are several."""
    metrics = {"loss/text": text_losses.mean(), "loss/image": torch.cat(level_losses, dim=1).mean()}
    if len(level_losses) > 1:
        metrics |= {f"loss/image/{level}": part.mean() for level, part in enumerate(level_losses)}
    return metrics


def drop_captions(text_BT: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    """Replace each caption by pads with probability `share` (Ho & Salimans 2022); torch's global RNG.

    Also returns which targets are kept, bool [B, T]; None: all.
    """
    if share == 0:
        return text_BT, None
    dropped_B1 = torch.rand(len(text_BT), 1, device=text_BT.device) < share
    return text_BT.masked_fill(dropped_B1, PAD_ID), ~dropped_B1.expand_as(text_BT)


def replace_codes(codes_BN: Tensor, layout: Layout, most: float) -> Tensor:
    """Codes of which a share is others, drawn evenly from their codebooks; torch's global RNG.

    The share is a sample's own, drawn evenly from 0 to `most`. After Han et al. 2024 (Infinity, arXiv
    2412.04431), who flip bits and quantize anew what is left of the image; token arrays hold no image, so here the
    targets stay.
    """
    if most == 0:
        return codes_BN
    sizes = [codes_BN.new_full((level.positions,), level.codebook_size) for level in layout.levels]
    share_B1 = most * torch.rand(len(codes_BN), 1, device=codes_BN.device)
    replaced_BN = torch.rand(codes_BN.shape, device=codes_BN.device) < share_B1
    others_BN = torch.randint(2**62, codes_BN.shape, device=codes_BN.device) % torch.cat(sizes)
    return torch.where(replaced_BN, others_BN, codes_BN)
