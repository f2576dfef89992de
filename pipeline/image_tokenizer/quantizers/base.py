"""What every quantizer is, the search for the best of many codes, and the entropy of their use.

Shapes: B images, N positions, C channels of features, D of a code's vector, K codes.
To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError


class Quantized(NamedTuple):
    """What a quantizer makes of features in training."""

    vectors: Tensor  # [B,N,D] float32, what the decoder sees, with a gradient to the features
    loss: Tensor  # a scalar, added to the reconstruction loss, which is a mean over pixel values
    metrics: dict[str, Tensor]  # detached scalars


class Quantizer(nn.Module, ABC):
    """Feature vectors to codes, one or (residual) several per position, and codes to vectors. Float32 throughout.

    The constructor of a subclass takes (its config, in_width, values_per_position): see `build_quantizer`.

    Attributes:
        codebook_sizes: K of each code of a position, coarse to fine.
        code_width: D, channels of the vectors that the decoder gets.
    """

    codebook_sizes: list[int]
    code_width: int

    def forward(self, features_BNC: Tensor, step: int) -> Quantized:
        """The training pass. All its randomness comes from torch's global generator."""
        with torch.autocast(features_BNC.device.type, enabled=False):
            return self._quantize(features_BNC.float(), step)

    @torch.no_grad()
    def encode(self, features_BNC: Tensor) -> list[Tensor]:
        """Codes, an int64 [B,N] for each of `codebook_sizes`."""
        with torch.autocast(features_BNC.device.type, enabled=False):
            return self._codes(features_BNC.float())

    @torch.no_grad()
    def sample(self, features_BNC: Tensor) -> list[Tensor]:
        """Codes like those of `encode`, drawn from q(code | position) by torch's global generator.

        Raises UserError where a quantizer has no such distribution.
        """
        with torch.autocast(features_BNC.device.type, enabled=False):
            return self._samples(features_BNC.float())

    def vectors(self, codes: list[Tensor]) -> Tensor:
        """The vectors [B,N,D] of codes as `encode` gives them."""
        with torch.autocast(codes[0].device.type, enabled=False):
            return self._vectors(codes)

    @abstractmethod
    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized: ...

    @abstractmethod
    def _codes(self, features_BNC: Tensor) -> list[Tensor]: ...

    def _samples(self, features_BNC: Tensor) -> list[Tensor]:
        raise UserError(
            f"{type(self).__name__} has no distribution over codes to draw from: use encode, or train a tokenizer with"
            " the gumbel quantizer (kind dvae has it)"
        )

    @abstractmethod
    def _vectors(self, codes: list[Tensor]) -> Tensor: ...

    def after_update(self, applied: bool) -> None:
        """Collective, once an optimizer update. `applied`: the update was finite and changed the weights."""
        return


_ROWS, _BLOCK = 64, 128  # a slab of scores that stays in the cache; codes of a block


@torch.no_grad()
def best_code(vectors_nD: Tensor, codes_KD: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """argmax over k of v·c_k + bias_k for each vector, int64 [n].

    A slab of rows at a time, and in two steps: the maximum of each block of codes (vectorised, unlike an argmax),
    then the position in the best block. Ties go to the lowest code. In the precision of its inputs: give it float32.
    """
    n, K = len(vectors_nD), len(codes_KD)
    bias_K = codes_KD.new_zeros(K) if bias_K is None else bias_K
    transposed, bias_1K = codes_KD.T.contiguous(), bias_K[None]
    found = torch.empty(n, dtype=torch.int64, device=vectors_nD.device)
    slab = vectors_nD.new_empty(min(n, _ROWS), K)  # written again and again: new pages would cost as much as the sums
    row = torch.arange(len(slab), device=slab.device)
    for begin in range(0, n, _ROWS):
        rows = vectors_nD[begin : begin + _ROWS]
        scores = torch.addmm(bias_1K, rows, transposed, out=slab[: len(rows)])
        if K % _BLOCK:
            best = scores.argmax(-1)
        else:
            blocks = scores.view(len(rows), -1, _BLOCK)
            block = blocks.amax(-1).argmax(-1)
            best = block * _BLOCK + blocks[row[: len(rows)], block].argmax(-1)
        found[begin : begin + _ROWS] = best
    return found


@torch.no_grad()
def nearest_code(vectors_nD: Tensor, codebook_KD: Tensor) -> Tensor:
    """The code with the smallest ‖v − e_k‖ for each vector, int64 [n]; ‖v‖² is the same for all k."""
    return best_code(vectors_nD, codebook_KD, -0.5 * codebook_KD.square().sum(-1))


def entropy(p_K: Tensor) -> Tensor:
    """Entropy of a categorical [K], a scalar in nats."""
    return -torch.xlogy(p_K, p_K.clamp_min(1e-12)).sum()
