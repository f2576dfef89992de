"""The discrete VAE of Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1 and appendix A.

The encoder q_φ gives each position a categorical over K codes, the decoder p_θ gives pixels from the codes' vectors.
Training relaxes the sampling by the Gumbel-softmax (Jang et al. 2016; Maddison et al. 2016): the decoder
sees a convex combination of the vectors, which turns into one vector as the temperature τ falls. The loss is
the negative evidence lower bound, with weight β on the KL term to the uniform prior. Afterwards an image's
codes are the argmax, with no noise (appendix A.3).

As in the paper: residual blocks whose branch is scaled down, 1×1 convolutions on both sides of the codes (they keep
the receptive field around the relaxation small), max-pooling down, nearest neighbour up, float32 around the codes
(under autocast too). Unlike it, for short trainings on small machines, and off by default: `patch_size` folds pixels
into channels first; `logits: distance` scores a code by how near its vector lies, so that one set of vectors serves
encoder and decoder; `batch_entropy_weight` pulls the batch's mean posterior to uniform, which keeps codes from dying
early (each single posterior stays free to be sure).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.image_tokenizer import DVAEConfig
from pipeline.core.level import Level
from pipeline.image_tokenizer.architecture import Decoder, Encoder
from pipeline.image_tokenizer.base import ImageTokenizer, TokenizerObjective, check_size
from pipeline.image_tokenizer.losses import ReconstructionLoss, output_to_images, sample_gumbel
from pipeline.image_tokenizer.quantizers.base import best_code, nearest_code
from pipeline.image_tokenizer.quantizers.gumbel import distance_logits, gumbel_softmax, kl_losses


class DiscreteVAE(ImageTokenizer):
    """One level of (image_size / factor)² codes, each one of `codebook_size`."""

    config: DVAEConfig
    config_class = DVAEConfig

    def __init__(self, config: DVAEConfig, image_size: int) -> None:
        check_size(image_size, config)
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
        self.decoder = Decoder(config, config.code_width)

    @property
    def levels(self) -> list[Level]:
        side = self.image_size // self.config.factor
        return [Level(side, side, self.config.codebook_size)]

    def logits(self, images_B3HW: Tensor) -> Tensor:
        """Unnormalised ln q(code | image), float32 [B, N, K], the N positions rows first."""
        features_BNC = self.encoder(images_B3HW)[-1].flatten(2).transpose(1, 2)
        with torch.autocast(features_BNC.device.type, enabled=False):
            z_BNC = self.to_logits(features_BNC.float())
            if self.config.logits == "distance":
                return distance_logits(z_BNC, self.codebook, self.log_scale)
            return z_BNC

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
        """Codes by argmax of the logits, without noise (appendix A.3), and without writing all the logits out."""
        self._check_images(images)
        features_BCN = self.encoder(images)[-1].flatten(2)
        flat = features_BCN.transpose(1, 2).flatten(0, 1)
        with torch.autocast(flat.device.type, enabled=False):
            if self.config.logits == "distance":
                codes = nearest_code(self.to_logits(flat.float()), self.codebook)
            else:
                codes = best_code(flat.float(), self.to_logits.weight, self.to_logits.bias)
        return [codes.view(features_BCN.shape[0], -1)]

    @torch.no_grad()
    def sample(self, images: Tensor) -> list[Tensor]:
        """Codes drawn from q(code | image) instead of its argmax, by the Gumbel-max trick (Maddison et al. 2014).

        With torch's global generator. Ramesh et al. 2021, section 2.2, footnote: a regulariser for the transformer.
        """
        self._check_images(images)
        logits_BNK = self.logits(images)
        return [(logits_BNK + sample_gumbel(logits_BNK)).argmax(-1)]

    @torch.no_grad()
    def decode(self, codes: list[Tensor]) -> Tensor:
        return output_to_images(self.config.reconstruction, self._decode_vectors(F.embedding(codes[0], self.codebook)))

    def objective(self) -> DVAEObjective:
        return DVAEObjective(self)


class DVAEObjective(TokenizerObjective):
    """−ELBO a pixel value: reconstruction + β · KL, with the KL of all positions shared out over the 3·H·W values."""

    def __init__(self, tokenizer: DiscreteVAE) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.reconstruction = ReconstructionLoss(tokenizer.config.reconstruction)

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.tokenizer.config
        images = batch["images"].float() / 255

        logits_BNK = self.tokenizer.logits(images)
        weights_BNK = gumbel_softmax(logits_BNK, config.temperature.at(step), hard=config.straight_through)
        output = self.tokenizer.decode_mixture(weights_BNK)

        reconstruction, metrics = self.reconstruction(images, output, step)
        terms, more = kl_losses(logits_BNK, config, step, images[0].numel())
        return reconstruction + terms, metrics | more
