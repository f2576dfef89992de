"""A PatchGAN discriminator (Isola et al. 2017, section 3.2) that sharpens reconstructions (Esser et al. 2021, VQGAN).

    discriminator   ½ · mean(max(0, 1 − D(x)) + max(0, 1 + D(x̂)))  +  w_LC · R_LC              hinge; x̂ without gradient
    tokenizer       L_rec  +  λ · weight · ramp · guard · (−mean D(x̂))                         D without gradient

Both are one loss in one backward pass, so that accumulation, several processes, checkpoints and resume are those of any
objective; the optimizer has a group of its own for D (learning rate, betas, clipping).

**λ**, with `weighting: adaptive`, makes the two gradients equally long (Esser et al. 2021, eq. 7), so that `weight` is
their ratio. Here they are compared at the decoder's output, not in its last layer's weights: that asks nothing of the
decoder. With `fixed`, λ = 1.

**LeCam** (Tseng et al. 2021, section 3): R_LC = mean (D(x) − α_F)² + mean (D(x̂) − α_R)², with α_R, α_F the running
means of D on real and rebuilt images: D cannot grow without bound on few images.

**Guard.** The squared error of x̂ is watched: a slow running mean, whose lowest value since `start_step` is the best,
and a fast one. While the fast one and the batch lie more than `guard` above the best, the adversarial weight halves
with each batch; afterwards it grows back by a percent a batch. That it fell is logged with the next metrics, of which
`adversarial_guard` shows it. All of this lies in buffers and is averaged over ranks: it resumes to the same bits. It is
decided on the device, and no step waits for it.

D never learns before `start_step`: its gradients are then zero, not absent, which DistributedDataParallel needs.
"""

from __future__ import annotations

import logging
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.config.image_losses import AdversarialConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize, height_width, told
from pipeline.core.objective import ParameterGroup

log = logging.getLogger(__name__)

_SLOW, _FAST = 0.99, 0.9  # decay of the running means, per batch
_ENOUGH = 20  # batches, before the lowest mean is more than luck
_HALVE, _GROW, _LEAST = 0.5, 1.01, 2.0**-20
_LARGEST_RATIO = 1e4  # of gradients; as in Esser et al.'s code


class PatchDiscriminator(nn.Module):
    """Images [B,3,H,W], real ones in [0,1] -> a score for each patch, float32 [B,1,h,w]: high for real ones.

    4×4 convolutions, `layers` of them with stride 2, channels doubling up to 8 times `width`. Groups are normalised
    where Isola et al. normalise batches: an image's score then depends on no image beside it, and no running
    statistics are kept.
    """

    def __init__(self, config: AdversarialConfig, image_size: ImageSize) -> None:
        least = 3 * 2**config.layers
        if min(height_width(image_size)) < least:
            raise UserError(
                f"adversarial.layers {config.layers} needs images of at least {least}×{least} pixels, found"
                f" {told(image_size)}: set adversarial.layers to less, or leave adversarial out"
            )
        super().__init__()
        widths = [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths)):
            stride = 2 if i < config.layers - 1 else 1
            layers += [nn.Conv2d(before, after, 4, stride, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.config = config

    def forward(self, images_B3HW: Tensor) -> Tensor:
        out: Tensor = self.layers(2 * images_B3HW - 1)
        return out.float()

    def parameter_group(self) -> ParameterGroup:
        """All its parameters, with the learning rate and betas of its config and without weight decay."""
        return ParameterGroup(
            list(self.parameters()),
            learning_rate_scale=self.config.learning_rate_ratio,
            betas=self.config.betas,
            weight_decay=False,
            adversary=True,
        )


class Adversary(nn.Module):
    """The discriminator with its losses, and the guard."""

    score_real: Tensor
    score_rebuilt: Tensor
    score_batches: Tensor

    def __init__(self, config: AdversarialConfig, image_size: ImageSize) -> None:
        super().__init__()
        self.config = config
        self.discriminator = PatchDiscriminator(config, image_size)
        self.guard = Guard(config.guard)
        for name in ("score_real", "score_rebuilt", "score_batches"):
            self.register_buffer(name, torch.zeros(()))

    def forward(
        self, images: Tensor, rebuilt: Tensor, output: Tensor, loss: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What to add to `loss`, and metrics.

        `images` [B,3,H,W] in [0,1]; `rebuilt`, not clamped, and `loss` are functions of `output`, the decoder's.
        """
        config = self.config
        error = _mean_over_ranks((rebuilt.detach().float().clamp(0, 1) - images).square().mean())
        strength = self.guard(error, watching=step >= config.start_step)
        if step < config.start_step:
            idle = 0.0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
            return idle, self._metrics(idle, idle, idle, strength, idle, idle, idle)
        real, fake = self.discriminator(images), self.discriminator(rebuilt.detach())
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        lecam = self._lecam(real, fake)
        added = hinge + config.lecam_weight * lecam
        ramp = min(1.0, (step - config.start_step) / config.ramp_steps)
        weight, adversarial = torch.zeros_like(strength), torch.zeros_like(strength)
        if ramp > 0:
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            adversarial = -functional_call(self.discriminator, frozen, (rebuilt,)).mean()
            ratio = _gradient_ratio(loss, adversarial, output) if config.weighting == "adaptive" else 1.0
            weight = ratio * config.weight * ramp * strength
            added = added + weight * adversarial
        return added, self._metrics(hinge, adversarial, weight, strength, real.mean(), fake.mean(), lecam)

    @staticmethod
    def _metrics(
        hinge: Tensor, adversarial: Tensor, weight: Tensor, strength: Tensor, real: Tensor, fake: Tensor, lecam: Tensor
    ) -> dict[str, Tensor]:
        named = {
            "discriminator_loss": hinge,
            "adversarial_loss": adversarial,
            "adversarial_weight": weight,
            "adversarial_guard": strength,
            "score_real": real,
            "score_rebuilt": fake,
            "lecam": lecam,
        }
        return {name: value.detach() for name, value in named.items()}

    def _lecam(self, real: Tensor, fake: Tensor) -> Tensor:
        with torch.no_grad():
            now = _mean_over_ranks(torch.stack([real.mean(), fake.mean()]))
            if self.training:
                _follow(self.score_real, now[0], self.score_batches, _SLOW)
                _follow(self.score_rebuilt, now[1], self.score_batches, _SLOW)
                self.score_batches += 1
        alpha_real, alpha_fake = self.score_real.clone(), self.score_rebuilt.clone()
        return (real - alpha_fake).square().mean() + (fake - alpha_real).square().mean()


class Guard(nn.Module):
    """A factor in (0, 1] for the adversarial weight, from the squared error of the reconstructions."""

    fast: Tensor
    slow: Tensor
    best: Tensor
    strength: Tensor
    batches: Tensor

    def __init__(self, tolerance: float | None) -> None:
        super().__init__()
        self.tolerance = tolerance
        self._told = False
        for name, value in {"fast": 0.0, "slow": 0.0, "best": float("inf"), "strength": 1.0, "batches": 0.0}.items():
            self.register_buffer(name, torch.tensor(value))

    @torch.no_grad()
    def forward(self, error: Tensor, watching: bool) -> Tensor:
        """`error`: of this batch, over all ranks. Before it is `watching`, the mean so far is the best."""
        if self.tolerance is None or not self.training:
            return self.strength.clone()
        finite = torch.isfinite(error)
        _follow(self.fast, error, self.batches, _FAST)
        _follow(self.slow, error, self.batches, _SLOW)
        self.batches += finite
        known = (self.batches >= _ENOUGH) & watching
        best = torch.where(known, torch.minimum(self.best, self.slow), self.slow)
        self.best.copy_(torch.where(finite, best, self.best))
        limit = (1 + self.tolerance) * self.best
        high = (self.fast > limit) & (error > limit) & watching
        strength = torch.where(high, (_HALVE * self.strength).clamp(min=_LEAST), (_GROW * self.strength).clamp(max=1))
        self.strength.copy_(torch.where(finite, strength, self.strength))
        return self.strength.clone()

    def report(self, step: int) -> None:
        """Warn where the weight has fallen since the last call; it waits for the device."""
        lowered = bool(self.strength < 1)
        if lowered and not self._told and self.tolerance is not None:
            log.warning(
                "step %d: the squared error of reconstructions rose more than %.0f %% above its best, %.3g; it is now"
                " %.3g: the adversarial weight is lowered until it comes down",
                step, 100 * self.tolerance, self.best, self.fast,
            )  # fmt: skip
        self._told = lowered


def _gradient_ratio(loss: Tensor, adversarial: Tensor, output: Tensor) -> Tensor:
    """How many times as long the gradient of `loss` is as that of `adversarial`, at `output`, over all ranks."""
    lengths = []
    for value in (loss, adversarial):
        [gradient] = torch.autograd.grad(value, output, retain_graph=True)
        lengths.append(gradient.detach().float().square().sum())
    squares = _mean_over_ranks(torch.stack(lengths))
    return (squares[0] / squares[1].clamp_min(1e-30)).sqrt().clamp(max=_LARGEST_RATIO)


def _follow(mean: Tensor, value: Tensor, batches: Tensor, decay: float) -> None:
    """Move a running mean, that of all values so far as long as they are few; what is not finite is left out."""
    share = torch.clamp(1 / (batches + 1), min=1 - decay)
    mean.lerp_(torch.where(torch.isfinite(value), value.to(mean.dtype), mean), share)


def _mean_over_ranks(value: Tensor) -> Tensor:
    return distributed.sum_tensor(value.detach()) / distributed.world_size()
