"""Quantizers: vectors of features to discrete codes and back, exchangeable in any architecture.

`base.py` is the interface. Written here: codebooks (`codebook.py`), lookup-free (`binary.py`), Gumbel (`gumbel.py`).
From the library vector-quantize-pytorch: finite scalar quantization (`scalar.py`) and the rotation trick.
docs/tokenizers.md says why not the rest.
"""

from __future__ import annotations

from typing import Any

from pipeline.image_tokenizer.quantizers.base import Quantized as Quantized
from pipeline.image_tokenizer.quantizers.base import Quantizer as Quantizer


def build_quantizer(config: Any, in_width: int, values_per_position: int) -> Quantizer:
    """A quantizer of features of `in_width` channels; `values_per_position`: pixel values of a position."""
    if config.kind in ("ema", "gradient"):
        from pipeline.image_tokenizer.quantizers.codebook import CodebookQuantizer

        return CodebookQuantizer(config, in_width)
    if config.kind == "fsq":
        from pipeline.image_tokenizer.quantizers.fsq import FiniteScalarQuantizer

        return FiniteScalarQuantizer(config, in_width)
    if config.kind == "lfq":
        from pipeline.image_tokenizer.quantizers.lfq import BinaryQuantizer

        return BinaryQuantizer(config, in_width)
    from pipeline.image_tokenizer.quantizers.gumbel import GumbelQuantizer

    return GumbelQuantizer(config, in_width, values_per_position)
