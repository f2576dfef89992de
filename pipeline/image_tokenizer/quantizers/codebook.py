"""Vector quantization with a codebook: van den Oord et al. 2017, "Neural Discrete Representation Learning".

z becomes the nearest vector e_k, and the gradient passes straight through. How the codebook learns is what its two
kinds differ in: by moving averages (ema.py) or by gradient (gradient.py). Written by hand, although a library has it,
because of what happens around a step (docs/tokenizers.md):

- The codebook changes after the optimizer's update, once, from the statistics of all micro-batches and all ranks, and
  not at all when the update was not finite.
- It starts as the k-means clusters of the whole first step, whose vectors pass as they are; unused codes move to
  vectors of the whole step. Into how many micro-batches and ranks a batch is cut does not matter.
- Start and revival draw from the step's own random numbers, on rank 0, and are sent to all ranks: the same bits after a
  resume, and on every rank. Everything that lasts longer than a step is a buffer or parameter.
- No step waits for the device once the codebook has started: what depends on the data is a mask, no branch.

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

    def after_update(self, applied: bool | Tensor) -> None:
        books = self._codebooks()
        if books[0].has_started:
            for book in books:
                book.after_update(applied)
            return
        [z_nD, *_] = [book.forget() for book in books]
        if z_nD is not None and applied:
            self._start(z_nD)

    def forget(self) -> None:
        for book in self._codebooks():
            book.forget()

    @torch.no_grad()
    def _start(self, z_nD: Tensor) -> None:
        """Each codebook starts from what the ones before leave of this rank's vectors of the first step. Collective."""
        for book in self._codebooks():
            book.start(z_nD)
            z_nD = z_nD - F.embedding(book.nearest(z_nD), book.vectors())


class Codebook(nn.Module, ABC):
    """K vectors, and how often each was the nearest lately. A subclass says how they learn.

    It registers `embedding` and calls `_register_counts` in its constructor.
    """

    embedding: Tensor  # [K,D]; a parameter where it is learned by gradient
    ema_counts: Tensor  # [K], moving average of the positions whose nearest is a code, per step, all ranks
    started: Tensor  # bool: a first step has been seen

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.has_started = False  # `started` on the host, for a branch that does not wait for the device
        self.register_load_state_dict_post_hook(_read_started)
        # Of one step, emptied after its update: no buffers, which DistributedDataParallel would overwrite by rank 0's.
        self._statistics: Tensor | None = None
        self._seen: list[Tensor] = []
        self.calls = 1  # of `forward` for each micro-batch

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
        """The nearest vectors [B,N,D] (with a gradient to the codebook where that is how it learns).

        In training, as long as the codebook has not started, z itself.
        """
        z_nD = z_BND.detach().flatten(0, 1)
        if self.training:
            self._seen.append(z_nD)
            if not self.has_started:
                return z_BND.detach() + 0.0 * self.embedding.sum()  # a gradient: DistributedDataParallel waits for it
        codes = self.nearest(z_BND.detach())
        if self.training:
            with torch.no_grad():
                self._statistics = self._new_statistics() if self._statistics is None else self._statistics
                self._count(self._statistics, z_nD, codes.flatten())
        return F.embedding(codes, self.vectors())

    def forget(self) -> Tensor | None:
        """Empty what a step leaves behind; returns its vectors [n,D] on this rank: of each call, all micro-batches'."""
        seen = [vectors for call in range(self.calls) for vectors in self._seen[call :: self.calls]]
        self._seen, self._statistics = [], None
        return torch.cat(seen) if len(seen) > 1 else next(iter(seen), None)

    def _new_statistics(self) -> Tensor:
        """[K,1+…]: what a step counts for each code, in column 0 how often it was the nearest."""
        return torch.zeros(len(self.ema_counts), 1, device=self.ema_counts.device)

    def _count(self, statistics: Tensor, z_nD: Tensor, codes_n: Tensor) -> None:
        statistics[:, 0].index_add_(0, codes_n, z_nD.new_ones(len(codes_n)))

    @torch.no_grad()
    def after_update(self, applied: bool | Tensor) -> None:
        """Learns from what all ranks counted since the last call; forgets it unless `applied`. Collective."""
        statistics, z_nD = self._statistics, self.forget()
        if applied is False or statistics is None or z_nD is None:
            return
        before = [] if applied is True else [tensor.clone() for tensor in self._learned()]
        statistics = distributed.sum_tensor(statistics)
        self._learn(statistics)
        self._revive(z_nD, even_share=statistics[:, 0].sum() / len(statistics))
        for tensor, value in zip(self._learned(), before, strict=bool(before)):
            tensor.copy_(torch.where(torch.as_tensor(applied), tensor, value))

    def _learned(self) -> list[Tensor]:
        """What changes after an update."""
        return [self.embedding.data, self.ema_counts]

    def _learn(self, statistics: Tensor) -> None:
        self.ema_counts.lerp_(statistics[:, 0], 1 - self.config.decay)

    def _revive(self, z_nD: Tensor, even_share: Tensor) -> None:
        """Codes out of use move to vectors of this step, each to another one."""
        dead_K = self.ema_counts < self.config.dead_code_threshold * even_share
        drawn = drawn_vectors(z_nD, len(dead_K))
        turn_K = dead_K.cumsum(0) - 1  # the i-th dead code takes the i-th drawn vector
        self._move(dead_K & (turn_K < len(drawn)), drawn[turn_K.clamp(0, len(drawn) - 1)], even_share)

    def _move(self, moved_K: Tensor, vectors_KD: Tensor, counts: Tensor) -> None:
        """Put codes to new vectors. `counts`: what they begin with, a scalar or [K]."""
        self.embedding.data.copy_(torch.where(moved_K[:, None], vectors_KD, self.embedding.data))
        self.ema_counts.copy_(torch.where(moved_K, counts, self.ema_counts))

    @torch.no_grad()
    def start(self, z_nD: Tensor) -> None:
        """Begin as the k-means clusters of the vectors [n,D] of all ranks. Collective."""
        if self.config.kmeans_iterations:
            means, counts = kmeans(z_nD, len(self.ema_counts), self.config.kmeans_iterations)
        else:
            means = distributed.broadcast_tensor(self.embedding.data.clone())
            share = len(z_nD) * distributed.world_size() / len(self.ema_counts)
            counts = torch.full_like(self.ema_counts, share)
        self._move(torch.ones_like(counts, dtype=torch.bool), means, counts)
        self._normalize()
        self.started.fill_(True)
        self.has_started = True

    def _normalize(self) -> None:
        if self.config.normalize:
            self.embedding.data.copy_(F.normalize(self.embedding.data, dim=-1))


def _read_started(module: nn.Module, _: object) -> None:
    assert isinstance(module, Codebook)
    module.has_started = bool(module.started)


def kmeans(vectors_nD: Tensor, clusters: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Means [clusters,D] and sizes [clusters] of all ranks' vectors by Lloyd's algorithm. Collective.

    It begins with vectors drawn by rank 0's generator. With fewer vectors than clusters, every vector is a mean, and
    the rest are vectors again, a hundredth of their spread apart; sizes are then even shares.
    """
    n = len(vectors_nD) * distributed.world_size()
    means = torch.cat([drawn_vectors(vectors_nD, clusters) for _ in range(-(-clusters // n))])[:clusters]
    if clusters > n:
        noise = distributed.broadcast_tensor(torch.randn_like(means[n:]))
        means[n:] += 0.01 * means[:n].std(0, correction=0) * noise
    counts = torch.full((clusters,), n / clusters, device=vectors_nD.device)
    counted = torch.cat([vectors_nD.new_ones(len(vectors_nD), 1), vectors_nD], dim=1)
    for _ in range(iterations if n > clusters else 0):
        totals = counted.new_zeros(clusters, counted.shape[1])
        totals = distributed.sum_tensor(totals.index_add_(0, nearest_code(vectors_nD, means), counted))
        counts = totals[:, 0]
        means = torch.where(counts[:, None] > 0, totals[:, 1:] / counts[:, None].clamp_min(1), means)
    return means, counts


def drawn_vectors(vectors_nD: Tensor, count: int) -> Tensor:
    """`count` of all ranks' vectors, or all if they are fewer, drawn by rank 0's generator. Collective.

    Every rank has n vectors: its slice of the step's.
    """
    n, world = len(vectors_nD), distributed.world_size()
    order = distributed.broadcast_tensor(torch.randperm(n * world, device=vectors_nD.device)[:count])
    if world == 1:
        return vectors_nD[order]
    local = order - n * distributed.rank()
    own = (local >= 0) & (local < n)
    return distributed.sum_tensor(torch.where(own[:, None], vectors_nD[local.clamp(0, n - 1)], 0.0))
