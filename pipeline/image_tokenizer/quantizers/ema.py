"""A codebook that follows the encoder by exponential moving averages: van den Oord et al. 2017, appendix A.1.

    n_k ← γ n_k + (1 − γ) · (vectors of the step whose nearest is e_k)      m_k ← γ m_k + (1 − γ) · (their sum)
    e_k = m_k / n_k

What it shares with the codebook that learns by gradient is in codebook.py. To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.quantizers import CodebookConfig
from pipeline.image_tokenizer.quantizers.codebook import Codebook, CodebookQuantizer


class EmaCodebook(Codebook):
    """K vectors that are no parameters: `learn` sets them from the statistics of a step."""

    ema_sums: Tensor  # [K,D], moving average of the sum of a code's vectors per step

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__(config)
        self.register_buffer("embedding", self._random_vectors())
        self.register_buffer("ema_sums", torch.zeros_like(self.embedding))
        self._register_counts()

    def _new_statistics(self) -> Tensor:
        return torch.zeros(len(self.ema_counts), 1 + self.config.code_width, device=self.ema_counts.device)

    def _count(self, statistics: Tensor, z_nD: Tensor, codes_n: Tensor) -> None:
        super()._count(statistics, z_nD, codes_n)
        statistics[:, 1:].index_add_(0, codes_n, z_nD)

    def _learn(self, statistics: Tensor) -> None:
        super()._learn(statistics)
        counts, sums = statistics[:, 0], statistics[:, 1:]
        self.ema_sums.lerp_(sums, 1 - self.config.decay)
        seen = self.ema_counts[:, None] > 1e-3 * counts.sum() / len(counts)
        self.embedding.copy_(torch.where(seen, self.ema_sums / self.ema_counts[:, None], self.embedding))
        self._normalize()

    def _learned(self) -> list[Tensor]:
        return [*super()._learned(), self.ema_sums]

    def _move(self, moved_K: Tensor, vectors_KD: Tensor, counts: Tensor) -> None:
        super()._move(moved_K, vectors_KD, counts)
        sums_KD = vectors_KD * (counts[:, None] if counts.ndim else counts)
        self.ema_sums.copy_(torch.where(moved_K[:, None], sums_KD, self.ema_sums))


class EmaQuantizer(CodebookQuantizer):
    """Nearest vectors of codebooks that follow the encoder by moving averages."""

    codebook_class = EmaCodebook

    def averaged_codebooks(self) -> list[Tensor]:
        return [codebook.embedding for codebook in self._codebooks()]
