"""Finite scalar quantization: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple".

Each of a few channels is squashed and rounded to one of a few values; a code is their combination, so nothing has to be
learned, looked up or kept in use. The library's module, in float32 (its own guard covers CUDA alone).

To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from vector_quantize_pytorch import FSQ

from pipeline.config.quantizers import FSQConfig
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer


class FiniteScalarQuantizer(Quantizer):
    """A 1×1 convolution to d channels, then rounding; D = d."""

    def __init__(self, config: FSQConfig, in_width: int, values_per_position: int) -> None:
        super().__init__()
        self.code_width = len(config.channels)
        self.codebook_sizes = [config.codebook_size]
        self.project = nn.Linear(in_width, self.code_width)
        with unset_fake_temporarily() as fake:  # it looks at its numbers, which fake tensors have not (`smalti plan`)
            self.fsq = FSQ(levels=list(config.channels))
        if isinstance(fake, FakeTensorMode):
            for name, buffer in list(self.fsq.named_buffers()):
                setattr(self.fsq, name, fake.from_tensor(buffer))

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        vectors, _ = self.fsq(self.project(features_BNC))
        return Quantized(vectors, vectors.new_zeros(()), {})

    def _codes(self, features_BNC: Tensor) -> list[Tensor]:
        _, codes = self.fsq(self.project(features_BNC))
        return [codes.long()]

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        vectors: Tensor = self.fsq.implicit_codebook[codes[0]]
        return vectors
