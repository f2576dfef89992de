"""Quantizers: vectors of features to discrete codes and back, exchangeable in any architecture.

A kind is a file here, and a class of that file in `QUANTIZERS`:

    ema        nearest vector of a codebook that follows the encoder by moving averages  (both: codebook.py)
    gradient   nearest vector of a codebook that learns by gradient
    fsq        finite scalar quantization: each channel rounded to one of a few values (from vector-quantize-pytorch)
    lfq        lookup-free quantization, and its spherical form BSQ: each channel's sign
    multiscale one codebook on grids from coarse to fine, each on what the ones before left
    gumbel     Gumbel-softmax relaxation of a categorical: the discrete VAE's

docs/tokenizers.md says which are the library's, which are written here, and why.

To add one: a config class with its `kind` in pipeline/config/quantizers.py (and in the union there); a file here with a
`Quantizer` (base.py), whose constructor takes what `build_quantizer` gives; a line in `QUANTIZERS`; and an entry in
`KINDS` of tests/image_tokenizer/test_quantizers.py, which holds it to what every quantizer promises.
"""

from __future__ import annotations

from pkgutil import resolve_name

from pipeline.config.quantizers import QuantizerConfig
from pipeline.image_tokenizer.quantizers.base import Quantized as Quantized
from pipeline.image_tokenizer.quantizers.base import Quantizer as Quantizer

# kind -> module:class, imported on first use
QUANTIZERS = {
    "ema": "pipeline.image_tokenizer.quantizers.ema:EmaQuantizer",
    "gradient": "pipeline.image_tokenizer.quantizers.gradient:GradientQuantizer",
    "fsq": "pipeline.image_tokenizer.quantizers.fsq:FiniteScalarQuantizer",
    "lfq": "pipeline.image_tokenizer.quantizers.lfq:LookupFreeQuantizer",
    "multiscale": "pipeline.image_tokenizer.quantizers.multiscale:MultiscaleQuantizer",
    "gumbel": "pipeline.image_tokenizer.quantizers.gumbel:GumbelQuantizer",
}


def build_quantizer(config: QuantizerConfig, in_width: int, values_per_position: int) -> Quantizer:
    """A quantizer with random weights, of the kind that `config` names.

    Args:
        in_width: C, channels of the features.
        values_per_position: pixel values (3 × pixels) of an image that one position stands for.
    """
    quantizer: type[Quantizer] = resolve_name(QUANTIZERS[config.kind])
    return quantizer(config, in_width, values_per_position)
