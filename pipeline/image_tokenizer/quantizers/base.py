"""What every quantizer is, the search for the best of many codes, and the entropy of their use.

Shapes: B images, N positions, C channels of features, D of a code's vector, K codes.
To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.core import distributed
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
        asks_for_even_use: its loss depends on the codes' mean frequencies, of which `step_mean` makes a step's.
        step_mean: the mean [K] of a micro-batch -> that of the whole step on all ranks; see step_mean.py.
        draws: in training it draws.
        uniform: what it draws by, (a tensor, step) -> numbers in [0, 1) of its shape; see step_noise.py.
    """

    codebook_sizes: list[int]
    code_width: int
    asks_for_even_use = False
    draws = False
    step_mean: Callable[[Tensor], Tensor] = staticmethod(distributed.mean_with_gradient)
    uniform: Callable[[Tensor, int], Tensor] = staticmethod(lambda like, step: torch.rand_like(like))

    def forward(self, features_BNC: Tensor, step: int) -> Quantized:
        """The training pass. What it draws by `uniform` apart, its randomness is torch's global generator's.

        A quantizer that does not learn gives the vectors of its codes, as `encode` and `vectors` do, and has no loss.
        """
        with torch.autocast(features_BNC.device.type, enabled=False):
            if {parameter.requires_grad for parameter in self.parameters()} == {False}:
                vectors_BND = self._vectors(self._codes(features_BNC.detach().float())).detach()
                return Quantized(vectors_BND, vectors_BND.new_zeros(()), {})
            return self._quantize(features_BNC.float(), step)

    @torch.no_grad()
    def encode(self, features_BNC: Tensor) -> list[Tensor]:
        """Codes, an int64 [B,n] for each of `codebook_sizes`; n is N, or the positions of its grid in `grids`."""
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

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of the grid of each of `codebook_sizes`, for features of `height` × `width` positions.

        Raises UserError where they do not fit together.
        """
        return [(height, width)] * len(self.codebook_sizes)

    def learned_codebooks(self) -> list[nn.Parameter]:
        """The tables of codes' vectors that learn by gradient."""
        return []

    def averaged_codebooks(self) -> list[Tensor]:
        """The tables of codes' vectors that learn by moving averages: buffers."""
        return []

    def forget(self) -> None:
        """Empty what training passes since the last update left behind."""
        return

    def after_update(self, applied: bool | Tensor) -> None:
        """Collective, once an optimizer update. `applied`: the update was finite and changed the weights."""
        return


_CPU_VECTORS, _BLOCK = 64, 128  # of a slab of scores, which stays in the cache; codes of a block
_GPU_BYTES = 2**29  # of a slab: few launches, and little beside a step's activations


@torch.no_grad()
def best_code(vectors_nD: Tensor, codes_KD: Tensor, bias_K: Tensor | None = None) -> Tensor:
    """argmax over k of v·c_k + bias_k for each vector, int64 [n].

    A slab of vectors at a time. Ties go to the lowest code. In the precision of its inputs: give it float32.
    """
    bias_K = codes_KD.new_zeros(len(codes_KD)) if bias_K is None else bias_K
    found = torch.empty(len(vectors_nD), dtype=torch.int64, device=vectors_nD.device)
    if found.device.type == "cpu":
        _best_on_cpu(vectors_nD, codes_KD, bias_K, found)
        return found
    transposed, bias_1K = codes_KD.T.contiguous(), bias_K[None]
    rows = max(1, _GPU_BYTES // (4 * len(codes_KD)))
    for some_nD, some_n in zip(vectors_nD.split(rows), found.split(rows), strict=True):
        torch.argmax(torch.addmm(bias_1K, some_nD, transposed), -1, out=some_n)
    return found


def _best_on_cpu(vectors_nD: Tensor, codes_KD: Tensor, bias_K: Tensor, found_n: Tensor) -> None:
    """A code's scores of a slab lie beside each other, so that the maximum over codes is vectorised over vectors.

    In two steps: the maximum of each block of codes (unlike an argmax it is vectorised), the position in the best one.
    """
    K = len(codes_KD)
    block = _BLOCK if K % _BLOCK == 0 else K
    with_bias = torch.cat([codes_KD, bias_K[:, None]], dim=1)
    columns = torch.cat([vectors_nD, vectors_nD.new_ones(len(vectors_nD), 1)], dim=1).T.contiguous()
    slab = vectors_nD.new_empty(K * min(len(vectors_nD), _CPU_VECTORS))  # written again and again: new pages are dear
    row = torch.arange(_CPU_VECTORS)
    for some, some_n in zip(columns.split(_CPU_VECTORS, dim=1), found_n.split(_CPU_VECTORS), strict=True):
        n = len(some_n)
        scores_KbR = torch.mm(with_bias, some, out=slab[: K * n].view(K, n)).view(-1, block, n)
        best = scores_KbR.amax(1).argmax(0)
        torch.add(best * block, scores_KbR[best, :, row[:n]].argmax(1), out=some_n)


@torch.no_grad()
def nearest_code(vectors_nD: Tensor, codebook_KD: Tensor) -> Tensor:
    """The code with the smallest ‖v − e_k‖ for each vector, int64 [n]; ‖v‖² is the same for all k."""
    return best_code(vectors_nD, codebook_KD, -0.5 * codebook_KD.square().sum(-1))


def entropy(p_K: Tensor) -> Tensor:
    """Entropy of a categorical [K], a scalar in nats."""
    return -torch.xlogy(p_K, p_K.clamp_min(1e-12)).sum()
