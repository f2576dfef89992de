"""The discrete VAE of Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation", section 2.1 and appendix A.

The VQ-VAE of vqvae.py with the Gumbel quantizer and the paper's settings. The encoder q_φ gives each position a
categorical over K codes, the decoder p_θ gives pixels from the codes' vectors. The loss is the negative evidence lower
bound per pixel value, with weight β on the KL divergence to the uniform prior:

    loss = ( −ln p_θ(x | z)  +  β · Σ_positions KL(q_φ(k | x) ‖ uniform) ) / (3·H·W)

    reconstruction                   losses.py, `logit_laplace_nll`
    KL: formula, weight, sum         quantizers/gumbel.py, `kl_losses`; β and τ: `DVAEConfig.kl_weight`, `temperature`
    relaxation of the sampling       quantizers/gumbel.py, `gumbel_softmax`

As in the paper: residual blocks whose branch is scaled down, 1×1 convolutions on both sides of the codes (they keep
the receptive field around the relaxation small), max-pooling down, nearest neighbour up, float32 around the codes
(under autocast too).
"""

from __future__ import annotations

from pipeline.config.image_tokenizer_model import DVAEConfig
from pipeline.image_tokenizer.vqvae import VQVAE


class DiscreteVAE(VQVAE):
    """One level of (image_size / factor)² codes, each one of `codebook_size`."""

    config_class = DVAEConfig
