"""The discrete VAE of Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1 and appendix A.

The encoder q_φ gives each position a categorical over K codes, the decoder p_θ gives pixels from the codes' vectors.
Training relaxes the sampling by the Gumbel-softmax (Jang et al. 2016; Maddison et al. 2016): the decoder
sees a convex combination of the vectors, which turns into one vector as the temperature τ falls. The loss is
the negative evidence lower bound, with weight β on the KL term to the uniform prior. Afterwards a picture's
codes are the argmax, with no noise (appendix A.3).

As in the paper: residual blocks whose branch is scaled down, 1×1 convolutions on both sides of the codes (they keep
the receptive field around the relaxation small), max-pooling down, nearest neighbour up, float32 around the codes
(under autocast too). Unlike it, for short trainings on small machines, and off by default: `patch_size` folds pixels
into channels first; `logits: distance` scores a code by how near its vector lies, so that one set of vectors serves
encoder and decoder; `usage_weight` pulls the batch's mean posterior to uniform, which keeps codes from dying early
(each single posterior stays free to be sure).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.image_tokenizer.base import ImageTokenizer, Level
from pipeline.image_tokenizer.config import DVAEConfig
from pipeline.image_tokenizer.losses import (
    kl_of_mean_to_uniform,
    kl_to_uniform,
    reconstruction_loss,
    sample_gumbel,
    unshrink,
)


class ResidualBlock(nn.Module):
    """x + gain · (convolutions, each after a ReLU): the paper's bottleneck block, with its small constant."""

    def __init__(self, width: int, config: DVAEConfig, gain: float) -> None:
        super().__init__()
        inner = width // config.bottleneck
        layers: list[nn.Module] = []
        last = len(config.block_kernels) - 1
        for i, kernel in enumerate(config.block_kernels):
            in_width, out_width = (width if i == 0 else inner), (width if i == last else inner)
            layers += [nn.ReLU(), _conv(in_width, out_width, kernel)]
        self.branch = nn.Sequential(*layers)
        self.gain = gain

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = x_BCHW + self.gain * self.branch(x_BCHW)
        return out


class Encoder(nn.Module):
    """Pictures [B,3,H,W] -> features [B,C,h,w], before the 1×1 convolution that makes logits of them."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        gain = _gain(config)
        stages: list[nn.Module] = [_conv(3 * config.patch_size**2, config.widths[0], config.stem_kernel)]
        for i, width in enumerate(config.widths):
            if i:
                stages += [nn.MaxPool2d(2), _conv(config.widths[i - 1], width, 1)]
            stages += [ResidualBlock(width, config, gain) for _ in range(config.blocks)]
        self.layers = nn.Sequential(nn.PixelUnshuffle(config.patch_size), *stages, nn.ReLU())

    def forward(self, images_B3HW: Tensor) -> Tensor:
        out: Tensor = self.layers(2 * images_B3HW - 1)
        return out


class Decoder(nn.Module):
    """Vectors of codes [B,D,h,w] -> parameters of the pixels' distribution, [B,6,H,W] (μ, ln b) or [B,3,H,W]."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        gain = _gain(config)
        widths = config.widths[::-1]
        stages: list[nn.Module] = [_conv(config.code_width, widths[0], 1)]
        for i, width in enumerate(widths):
            if i:
                stages += [nn.Upsample(scale_factor=2, mode="nearest"), _conv(widths[i - 1], width, 1)]
            stages += [ResidualBlock(width, config, gain) for _ in range(config.blocks)]
        channels = 6 if config.reconstruction == "logit_laplace" else 3
        self.layers = nn.Sequential(*stages, nn.ReLU(), _conv(widths[-1], channels * config.patch_size**2, 1))
        self.patch_size = config.patch_size

    def forward(self, z_BDhw: Tensor) -> Tensor:
        # Pixel values in float32: at the end of training the loss resolves finer steps than bfloat16 has.
        return F.pixel_shuffle(self.layers(z_BDhw).float(), self.patch_size)


class DiscreteVAE(ImageTokenizer):
    """One level of (image_size / factor)² codes, each one of `codebook_size`."""

    config: DVAEConfig
    config_class = DVAEConfig

    def __init__(self, config: DVAEConfig, image_size: int) -> None:
        if image_size % config.factor:
            raise UserError(
                f"pictures of {image_size}×{image_size} cannot be cut into codes of {config.factor}×{config.factor}"
                f" pixels: choose an image size that is a multiple of {config.factor}, or other widths or patch_size"
            )
        super().__init__(config, image_size)
        self.encoder = Encoder(config)
        # Each linear layer on a position's features is a 1×1 convolution.
        if config.logits == "linear":
            self.to_logits = nn.Linear(config.widths[-1], config.codebook_size)
            self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_width))
        else:
            self.to_logits = nn.Linear(config.widths[-1], config.code_width)
            # Vectors about as far apart as the encoder's first outputs are: far ones would win no position.
            self.codebook = nn.Parameter(0.3 * torch.randn(config.codebook_size, config.code_width))
            self.log_scale = nn.Parameter(torch.zeros(()))
        self.decoder = Decoder(config)

    @property
    def levels(self) -> list[Level]:
        side = self.image_size // self.config.factor
        return [Level(side, side, self.config.codebook_size)]

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Unnormalised ln q(code | picture), float32 [B, N, K], the N positions rows first."""
        features_BNC = self.encoder(images_B3HW).flatten(2).transpose(1, 2)
        with torch.autocast(features_BNC.device.type, enabled=False):
            z_BNC = self.to_logits(features_BNC.float())
            return self._closeness(z_BNC) if self.config.logits == "distance" else z_BNC

    def _closeness(self, z_BND: Tensor) -> Tensor:
        """−s·‖z − e_k‖² to each vector e_k of the codebook, [B, N, K], without ‖z‖², which a softmax ignores."""
        e_KD = self.codebook
        bias_K = -e_KD.square().sum(-1)
        flat = torch.addmm(bias_K[None], z_BND.flatten(0, 1), 2 * e_KD.T) * self.log_scale.exp()
        return flat.unflatten(0, z_BND.shape[:2])

    def decode_mixture(self, weights_BNK: Tensor) -> Tensor:
        """The decoder's output for mixtures of codes: one-hot rows are codes."""
        with torch.autocast(weights_BNK.device.type, enabled=False):
            z_BND = weights_BNK @ self.codebook
        return self._decode_vectors(z_BND)

    def _decode_vectors(self, z_BND: Tensor) -> Tensor:
        side = self.levels[0].height
        out: Tensor = self.decoder(z_BND.transpose(1, 2).unflatten(2, (side, side)))
        return out

    @torch.no_grad()
    def encode(self, images: Tensor) -> list[Tensor]:
        self._check_images(images)
        return [self.logits(images).argmax(-1)]

    @torch.no_grad()
    def decode(self, codes: list[Tensor]) -> Tensor:
        out = self._decode_vectors(F.embedding(codes[0], self.codebook))
        if self.config.reconstruction == "logit_laplace":
            return unshrink(torch.sigmoid(out[:, :3]))
        return out.clamp(0, 1)

    def objective(self) -> DVAEObjective:
        return DVAEObjective(self)


class DVAEObjective(nn.Module):
    """−ELBO a pixel value: reconstruction + β · KL, with the KL of all positions shared out over the 3·H·W values."""

    def __init__(self, tokenizer: DiscreteVAE) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.tokenizer.config
        tau, beta = config.temperature.at(step), config.kl_weight.at(step)
        images = batch["images"].float() / 255

        logits_BNK = self.tokenizer.logits(images)
        weights_BNK = gumbel_softmax(logits_BNK, tau, hard=config.straight_through)
        output = self.tokenizer.decode_mixture(weights_BNK)

        reconstruction = reconstruction_loss(config.reconstruction, images, output)
        usage_weight = config.usage_weight.at(step)
        with torch.set_grad_enabled((beta > 0 or usage_weight > 0) and torch.is_grad_enabled()):
            q_BNK = F.softmax(logits_BNK, dim=-1)
        with torch.set_grad_enabled(beta > 0 and torch.is_grad_enabled()):
            kl = kl_to_uniform(logits_BNK, q_BNK).sum(-1).mean()
        loss = reconstruction + beta * kl / images[0].numel()
        if usage_weight > 0:
            loss = loss + usage_weight * kl_of_mean_to_uniform(q_BNK)
        metrics = {
            "reconstruction": reconstruction.detach(),
            "kl_nats_per_code": kl.detach() / logits_BNK.shape[1],
        }
        return loss, metrics


def gumbel_softmax(logits: Tensor, tau: float, hard: bool) -> Tensor:
    """A relaxed one-hot sample of the categorical, softmax((logits + Gumbel noise) / τ) over the last axis.

    `hard`: exactly one-hot, with the gradient of the relaxed one (straight-through).
    """
    soft = F.softmax((logits + sample_gumbel(logits)) / tau, dim=-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return one_hot + soft - soft.detach()


def _conv(in_width: int, out_width: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_width, out_width, kernel, padding=kernel // 2)
    nn.init.normal_(conv.weight, std=(in_width * kernel**2) ** -0.5)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _gain(config: DVAEConfig) -> float:
    return 1 / (len(config.widths) * config.blocks) ** 2
