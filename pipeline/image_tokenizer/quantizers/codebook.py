"""Vector quantization with a codebook: van den Oord et al. 2017, "Neural Discrete Representation Learning".

z becomes the nearest vector e_k, and the gradient passes straight through. The codebook follows the encoder by
exponential moving averages (appendix A.1 there) or by gradient (eq. 3). Written by hand, although a library has it,
because of what happens around a step (docs/tokenizers.md):

- The codebook changes after the optimizer's update, once, from the statistics of all micro-batches and all ranks, and
  not at all when the update was not finite.
- Start (k-means on the first batch) and revival of unused codes draw from the step's own random numbers, on rank 0, and
  are sent to all ranks: the same bits after a resume, and on every rank. Everything that lasts longer than a step is a
  buffer or parameter.

With `depth` > 1 further codebooks quantize what is left (residual VQ): Zeghidour et al. 2021; Lee et al. 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import CodebookConfig
from pipeline.core import distributed
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer, nearest_code


class CodebookQuantizer(Quantizer):
    """A 1×1 convolution to D channels, then one codebook, or several on what is left."""

    def __init__(self, config: CodebookConfig, in_width: int) -> None:
        super().__init__()
        self.config = config
        self.code_width = config.code_width
        self.codebook_sizes = [config.codebook_size] * config.depth
        self.project = nn.Linear(in_width, config.code_width)
        self.codebooks = nn.ModuleList(Codebook(config) for _ in range(config.depth))

    def _project(self, features_BNC: Tensor) -> Tensor:
        z_BND: Tensor = self.project(features_BNC)
        return F.normalize(z_BND, dim=-1) if self.config.normalize else z_BND

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        z_BND = self._project(features_BNC)
        left, total, loss = z_BND, torch.zeros_like(z_BND), z_BND.new_zeros(())
        for codebook in self.codebooks:
            e_BND = codebook(left)
            total = total + e_BND
            loss = loss + self.config.commitment_weight * F.mse_loss(left, e_BND.detach())
            if self.config.kind == "gradient":
                loss = loss + self.config.codebook_weight * F.mse_loss(e_BND, left.detach())
            left = left - e_BND.detach()
        metrics = {"quantization_error": left.detach().square().mean() / z_BND.detach().square().mean()}
        return Quantized(self._pass_gradient(z_BND, total.detach()), loss, metrics)

    def _pass_gradient(self, z: Tensor, e: Tensor) -> Tensor:
        if self.config.gradient == "straight_through":
            return z + (e - z).detach()
        from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

        rotated: Tensor = rotate_to(z, e)
        return rotated

    def _codes(self, features_BNC: Tensor) -> list[Tensor]:
        left = self._project(features_BNC)
        codes = []
        for codebook in self.codebooks:
            assert isinstance(codebook, Codebook)
            codes.append(codebook.nearest(left))
            if len(codes) < len(self.codebooks):
                left = left - F.embedding(codes[-1], codebook.vectors())
        return codes

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        total = [F.embedding(code, book.vectors()) for code, book in zip(codes, self.codebooks, strict=True)]  # type: ignore[operator]
        return torch.stack(total).sum(0)

    def after_update(self, applied: bool) -> None:
        for codebook in self.codebooks:
            codebook.after_update(applied)  # type: ignore[operator]


class Codebook(nn.Module):
    """K vectors, and how often each was used lately."""

    embedding: Tensor  # [K,D]; a parameter when it is learned by gradient
    sums: Tensor  # [K,D], moving average of the sum of a code's vectors a step (ema)
    used: Tensor  # [K], moving average of a code's positions a step, all ranks
    started: Tensor  # bool: the first batch has been seen

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        embedding = torch.randn(config.codebook_size, config.code_width)
        if config.normalize:
            embedding = F.normalize(embedding, dim=-1)
        if config.kind == "gradient":
            self.embedding = nn.Parameter(embedding)
        else:
            self.register_buffer("embedding", embedding)
            self.register_buffer("sums", torch.zeros_like(embedding))
        self.register_buffer("used", torch.zeros(config.codebook_size))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # Of one step, emptied after its update: no buffers, which DistributedDataParallel would overwrite by rank 0's.
        self._step_used: Tensor | None = None
        self._step_sums: Tensor | None = None
        self._candidates: Tensor | None = None

    def vectors(self) -> Tensor:
        """What the codes stand for, [K,D]."""
        return F.normalize(self.embedding, dim=-1) if self.config.normalize else self.embedding

    def nearest(self, z: Tensor) -> Tensor:
        """Codes, int64 [...], of vectors [...,D]."""
        return nearest_code(z.flatten(0, -2), self.vectors()).view(z.shape[:-1])

    def forward(self, z_BND: Tensor) -> Tensor:
        """The nearest vectors [B,N,D] (with a gradient to the codebook where that is how it learns)."""
        if self.training and not self.started:
            self._start(z_BND.detach().flatten(0, 1))
        codes = self.nearest(z_BND.detach())
        if self.training:
            self._count(z_BND.detach().flatten(0, 1), codes.flatten())
        return F.embedding(codes, self.vectors())

    @torch.no_grad()
    def _count(self, z_nD: Tensor, codes_n: Tensor) -> None:
        if self._step_used is None:
            self._step_used = torch.zeros_like(self.used)
            self._step_sums = torch.zeros_like(self.embedding)
        assert self._step_sums is not None
        self._step_used += torch.bincount(codes_n, minlength=len(self.used))
        if self.config.kind == "ema":
            self._step_sums.index_add_(0, codes_n, z_nD)
        self._candidates = z_nD

    @torch.no_grad()
    def after_update(self, applied: bool) -> None:
        used, sums, candidates = self._step_used, self._step_sums, self._candidates
        self._step_used = self._step_sums = self._candidates = None
        if not applied or used is None or sums is None or candidates is None:
            return
        statistics = distributed.sum_tensor(torch.cat([used[:, None], sums], dim=1))
        used, sums = statistics[:, 0], statistics[:, 1:]
        self.used.lerp_(used, 1 - self.config.decay)
        if self.config.kind == "ema":
            self.sums.lerp_(sums, 1 - self.config.decay)
            seen = self.used[:, None] > 1e-3 * used.sum() / len(used)
            self.embedding.copy_(torch.where(seen, self.sums / self.used[:, None], self.embedding))
            self._normalize()
        self._revive(candidates, even_share=used.sum() / len(used))

    def _revive(self, candidates_nD: Tensor, even_share: Tensor) -> None:
        """Codes out of use move to vectors of this step; at most as many as rank 0 has vectors."""
        dead = (self.used < self.config.dead_code_threshold * even_share).nonzero()[:, 0]  # the same on every rank
        if len(dead) == 0:
            return
        drawn = torch.randperm(len(candidates_nD), device=candidates_nD.device)[: len(dead)]
        chosen = distributed.broadcast_tensor(candidates_nD[drawn])
        dead = dead[: len(chosen)]
        self._place(dead, chosen[: len(dead)], even_share)

    def _place(self, codes: Tensor, vectors: Tensor, used: Tensor) -> None:
        self.embedding.data[codes] = vectors
        self.used[codes] = used
        if self.config.kind == "ema":
            self.sums[codes] = vectors * (used[:, None] if used.ndim else used)

    @torch.no_grad()
    def _start(self, z_nD: Tensor) -> None:
        """The codebook begins as the k-means clusters of the first batch (of rank 0)."""
        finite = distributed.broadcast_tensor(torch.isfinite(z_nD).all())
        if not finite:
            return
        if self.config.kmeans_iterations:
            means, counts = kmeans(z_nD, len(self.used), self.config.kmeans_iterations)
            means, counts = distributed.broadcast_tensor(means), distributed.broadcast_tensor(counts)
        else:
            means, counts = distributed.broadcast_tensor(self.embedding.data.clone()), torch.ones_like(self.used)
        counts = counts * distributed.world_size()
        self._place(torch.arange(len(means), device=means.device), means, counts)
        self._normalize()
        self.started.fill_(True)

    def _normalize(self) -> None:
        if self.config.normalize:
            self.embedding.data.copy_(F.normalize(self.embedding.data, dim=-1))


def kmeans(vectors_nD: Tensor, clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Means [clusters,D] and sizes [clusters] by Lloyd's algorithm, from vectors drawn by torch's generator.

    With fewer vectors than clusters, every vector is a mean, and the rest are vectors again, a hundredth of their
    spread apart.
    """
    n = len(vectors_nD)
    order = torch.cat([torch.randperm(n, device=vectors_nD.device) for _ in range(-(-clusters // n))])[:clusters]
    means = vectors_nD[order].clone()
    means[n:] += 0.01 * vectors_nD.std(0, correction=0) * torch.randn_like(means[n:])
    counts = torch.ones(clusters, device=vectors_nD.device)
    for _ in range(iterations if n > clusters else 0):
        codes = nearest_code(vectors_nD, means)
        counts = torch.bincount(codes, minlength=clusters).to(vectors_nD)
        sums = torch.zeros_like(means).index_add_(0, codes, vectors_nD)
        means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), means)
    return means, counts
