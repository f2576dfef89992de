"""Vector quantization with a codebook: van den Oord et al. 2017, "Neural Discrete Representation Learning".

z becomes the nearest vector e_k, and the gradient passes straight through. How the codebook learns is what its two
kinds differ in: by moving averages (ema.py) or by gradient (gradient.py). Written by hand, although a library has it,
because of what happens around a step (docs/tokenizers.md):

- The codebook changes after the optimizer's update, once, from the statistics of all micro-batches and all ranks, and
  not at all when the update was not finite.
- Start (k-means on the first batch) and revival of unused codes draw from the step's own random numbers, on rank 0, and
  are sent to all ranks: the same bits after a resume, and on every rank. Everything that lasts longer than a step is a
  buffer or parameter.

With `depth` > 1 further codebooks quantize what is left (residual VQ): Zeghidour et al. 2021; Lee et al. 2022.

To add one: a `Codebook` and a `CodebookQuantizer` that names it, in a file of its own; see quantizers/__init__.py.
"""

from __future__ import annotations

from abc import ABC
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import CodebookConfig
from pipeline.core import distributed
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer, nearest_code


class CodebookQuantizer(Quantizer, ABC):
    """A 1×1 convolution to D channels, then one codebook, or several on what is left."""

    codebook_class: ClassVar[type[Codebook]]

    def __init__(self, config: CodebookConfig, in_width: int, values_per_position: int) -> None:
        super().__init__()
        self.config = config
        self.code_width = config.code_width
        self.codebook_sizes = [config.codebook_size] * config.depth
        self.project = nn.Linear(in_width, config.code_width)
        self.codebooks = nn.ModuleList(self.codebook_class(config) for _ in range(config.depth))

    def _project(self, features_BNC: Tensor) -> Tensor:
        z_BND: Tensor = self.project(features_BNC)
        return F.normalize(z_BND, dim=-1) if self.config.normalize else z_BND

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        z_BND = self._project(features_BNC)
        left, total, loss = z_BND, torch.zeros_like(z_BND), z_BND.new_zeros(())
        for codebook in self._codebooks():
            e_BND = codebook(left)
            total = total + e_BND
            loss = loss + codebook.loss(left, e_BND)
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
        codes: list[Tensor] = []
        for codebook in self._codebooks():
            codes.append(codebook.nearest(left))
            if len(codes) < len(self.codebooks):
                left = left - F.embedding(codes[-1], codebook.vectors())
        return codes

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        each = [F.embedding(code, book.vectors()) for code, book in zip(codes, self._codebooks(), strict=True)]
        return torch.stack(each).sum(0)

    def _codebooks(self) -> list[Codebook]:
        return cast("list[Codebook]", list(self.codebooks))

    def after_update(self, applied: bool) -> None:
        for codebook in self._codebooks():
            codebook.after_update(applied)


class Codebook(nn.Module, ABC):
    """K vectors, and how often each was the nearest lately. A subclass says how they learn.

    It registers `embedding` and calls `_register_counts` in its constructor.
    """

    embedding: Tensor  # [K,D]; a parameter where it is learned by gradient
    ema_counts: Tensor  # [K], moving average of the positions whose nearest is a code, per step, all ranks
    started: Tensor  # bool: the first batch has been seen

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        # Of one step, emptied after its update: no buffers, which DistributedDataParallel would overwrite by rank 0's.
        self._statistics: Tensor | None = None
        self._candidates: Tensor | None = None

    def _random_vectors(self) -> Tensor:
        vectors = torch.randn(self.config.codebook_size, self.config.code_width)
        return F.normalize(vectors, dim=-1) if self.config.normalize else vectors

    def _register_counts(self) -> None:
        self.register_buffer("ema_counts", torch.zeros(self.config.codebook_size))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    def vectors(self) -> Tensor:
        """What the codes stand for, [K,D]."""
        return F.normalize(self.embedding, dim=-1) if self.config.normalize else self.embedding

    def nearest(self, z: Tensor) -> Tensor:
        """Codes, int64 [...], of vectors [...,D]."""
        return nearest_code(z.flatten(0, -2), self.vectors()).view(z.shape[:-1])

    def loss(self, z_BND: Tensor, e_BND: Tensor) -> Tensor:
        """What is added to the reconstruction loss for vectors z and their nearest e: the commitment, β‖z − sg[e]‖²."""
        return self.config.commitment_weight * F.mse_loss(z_BND, e_BND.detach())

    def forward(self, z_BND: Tensor) -> Tensor:
        """The nearest vectors [B,N,D] (with a gradient to the codebook where that is how it learns)."""
        if self.training and not self.started:
            self._start(z_BND.detach().flatten(0, 1))
        codes = self.nearest(z_BND.detach())
        if self.training:
            with torch.no_grad():
                self._statistics = self._new_statistics() if self._statistics is None else self._statistics
                self._candidates = z_BND.detach().flatten(0, 1)
                self._count(self._statistics, self._candidates, codes.flatten())
        return F.embedding(codes, self.vectors())

    def _new_statistics(self) -> Tensor:
        """[K,1+…]: what a step counts for each code, in column 0 how often it was the nearest."""
        return torch.zeros(len(self.ema_counts), 1, device=self.ema_counts.device)

    def _count(self, statistics: Tensor, z_nD: Tensor, codes_n: Tensor) -> None:
        statistics[:, 0] += torch.bincount(codes_n, minlength=len(statistics))

    @torch.no_grad()
    def after_update(self, applied: bool) -> None:
        """Learns from what all ranks counted since the last call; forgets it unless `applied`. Collective."""
        statistics, candidates = self._statistics, self._candidates
        self._statistics = self._candidates = None
        if not applied or statistics is None or candidates is None:
            return
        statistics = distributed.sum_tensor(statistics)
        self._learn(statistics)
        counts = statistics[:, 0]
        self._revive(candidates, even_share=counts.sum() / len(counts))

    def _learn(self, statistics: Tensor) -> None:
        self.ema_counts.lerp_(statistics[:, 0], 1 - self.config.decay)

    def _revive(self, candidates_nD: Tensor, even_share: Tensor) -> None:
        """Codes out of use move to vectors of this step; at most as many as rank 0 has vectors."""
        dead = (self.ema_counts < self.config.dead_code_threshold * even_share).nonzero()[:, 0]  # equal on every rank
        if len(dead) == 0:
            return
        drawn = torch.randperm(len(candidates_nD), device=candidates_nD.device)[: len(dead)]
        chosen = distributed.broadcast_tensor(candidates_nD[drawn])
        dead = dead[: len(chosen)]
        self._move(dead, chosen[: len(dead)], even_share)

    def _move(self, codes: Tensor, vectors: Tensor, counts: Tensor) -> None:
        self.embedding.data[codes] = vectors
        self.ema_counts[codes] = counts

    @torch.no_grad()
    def _start(self, z_nD: Tensor) -> None:
        """The codebook begins as the k-means clusters of the first batch (of rank 0)."""
        finite = distributed.broadcast_tensor(torch.isfinite(z_nD).all())
        if not finite:
            return
        if self.config.kmeans_iterations:
            means, counts = kmeans(z_nD, len(self.ema_counts), self.config.kmeans_iterations)
            means, counts = distributed.broadcast_tensor(means), distributed.broadcast_tensor(counts)
        else:
            means = distributed.broadcast_tensor(self.embedding.data.clone())
            counts = torch.ones_like(self.ema_counts)
        counts = counts * distributed.world_size()
        self._move(torch.arange(len(means), device=means.device), means, counts)
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
