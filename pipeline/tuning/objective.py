"""Group-relative policy optimisation (Shao et al. 2024, section 4.1, equations 3 and 4), for the codes of images.

    loss = mean over images and their codes of  -A exp(log p - sg(log p)) + kl_weight (exp(d) - d - 1)
    d = log q - log p

A: the image's reward minus the mean of its group, over the group's standard deviation; p: the probability of the code
that was drawn, by the model; q: by the model that tuning began with; sg: without a gradient. Images are drawn anew for
each update, so the ratio of the paper's equation 3 is 1 and its clipping never acts: what is left is its gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import TransformerObjective


class GroupRelativeObjective(TransformerObjective):
    """A transformer, and the loss of images that it has drawn, for `pipeline.training.trainer.train`."""

    def __init__(self, transformer: Transformer, kl_weight: float, temperature: float) -> None:
        """`temperature`: that the codes are drawn at."""
        super().__init__()
        self.transformer, self.kl_weight, self.temperature = transformer, kl_weight, temperature

    def train(self, mode: bool = True) -> GroupRelativeObjective:
        """The transformer stays as it draws: without dropout."""
        super().train(mode)
        self.transformer.eval()
        return self

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of drawn images: "text" int64 [B, T], "codes" int64 [B, N], and of each its "advantage" and
        "reward" [B], and "start", the log probabilities of its targets by the model that tuning began with [B, n].
        """
        own_Bn = log_probabilities(self.transformer, batch["text"], batch["codes"], self.temperature)
        apart_Bn = batch["start"] - own_Bn
        kl = (apart_Bn.exp() - apart_Bn - 1).mean()
        gain = (batch["advantage"][:, None] * (own_Bn - own_Bn.detach()).exp()).mean()
        metrics = {
            "reward": batch["reward"].mean(),
            "kl": kl.detach(),
            "groups_that_differ": (batch["advantage"] != 0).float().mean(),
        }
        return self.kl_weight * kl - gain, metrics


def log_probabilities(model: Transformer, text_BT: Tensor, codes_BN: Tensor, temperature: float = 1.0) -> Tensor:
    """log p, in nats, of each code (of each digit, with `code_groups`) given all before: float32 [B, n].

    Of a model that draws its codes in raster order, or a level at a time.
    """
    factors = model.hidden_and_head_weights(text_BT, codes_BN)[1:]
    found = []
    for (hidden_BnD, weight), target_Bn in zip(factors, model.targets(codes_BN), strict=True):
        logits_BVn = (hidden_BnD @ weight.T).float().transpose(1, 2) / temperature
        found.append(-F.cross_entropy(logits_BVn, target_Bn, reduction="none"))
    return torch.cat(found, dim=1)


def advantages(rewards: Tensor) -> Tensor:
    """Of rewards [groups, images], each over its group: (r - mean) / deviation; 0 where all of a group are equal."""
    deviation = rewards.std(dim=1, keepdim=True)
    above = rewards - rewards.mean(dim=1, keepdim=True)
    return torch.where(deviation > 0, above / deviation.clamp(min=1e-6), torch.zeros_like(above))
