"""Images to grids of discrete codes and back.

base            ImageTokenizer, the interface, and the kinds; vqvae: VQ-VAE and VQ-VAE-2; dvae: the discrete VAE
vqgan           the VQGAN's halves; vit: a vision transformer's; pretrained: weights of other libraries in them
architecture    the encoder and decoder that they share; ode: continuous depth in place of residual blocks
quantizers/     features to codes: ema, gradient, multiscale, fsq, lfq, gumbel
losses          pixels; image_losses: with the optional perceptual and discriminator (adversarial) terms
evaluation      PSNR, SSIM, codebook usage on hard codes, and images to look at
legacy          parameter names of the version before
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.image_tokenizer.base import ImageTokenizer as ImageTokenizer


def __getattr__(name: str) -> type[ImageTokenizer]:
    # On first use: importing the package must not load torch.
    if name == "ImageTokenizer":
        from pipeline.image_tokenizer.base import ImageTokenizer

        return ImageTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
