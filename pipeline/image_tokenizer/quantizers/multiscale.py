"""Multi-scale residual quantization: Tian et al. 2024, "Visual Autoregressive Modeling", section 3.2.

One codebook, and grids of s_1 ≤ s_2 ≤ … positions on a side, the last as large as the encoder's. Each quantizes what
the ones before left of the features f (algorithms 1 and 2):

    r_k = nearest(down(f − f̂_{k−1}, s_k))      f̂_k = f̂_{k−1} + φ_k(up(e[r_k]))      f̂ = f̂_K, what the decoder gets

down is the area's mean, up bicubic. φ_k is half the identity and half a 3×3 convolution; neighbouring grids share one.
With all grids of one size and no convolution it is the residual quantizer with one codebook of Lee et al. 2022.

Departure: a grid's vectors are standardised by their running mean (a vector) and deviation (a number), and what comes
out of the codebook goes back the same way. So one codebook serves grids whose residuals differ in size: without it, all
images have one of a few codes at s_1 = 1, whose vectors are far from zero and near each other. Of one vector an image
even so few codes come near; `codebook_per_scale`, ours too, gives each grid a codebook of its own.

To add one: see quantizers/__init__.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.quantizers import MultiscaleConfig
from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.resize import resize_matrix
from pipeline.image_tokenizer.quantizers.base import Quantized, Quantizer
from pipeline.image_tokenizer.quantizers.codebook import Codebook
from pipeline.image_tokenizer.quantizers.ema import EmaCodebook
from pipeline.image_tokenizer.quantizers.gradient import GradientCodebook

_CODEBOOKS: dict[str, type[EmaCodebook] | type[GradientCodebook]] = {"ema": EmaCodebook, "gradient": GradientCodebook}


class MultiscaleQuantizer(Quantizer):
    """A 1×1 convolution to D channels, then one codebook on grids of every scale, or one for each."""

    mean: Tensor  # [scales,D], of what each grid quantizes, a moving average
    square: Tensor  # [scales], the same of the mean over channels of its square

    def __init__(self, config: MultiscaleConfig, in_width: int, values_per_position: int) -> None:
        super().__init__()
        self.config, self.scales = config, config.scales
        self.code_width = config.codebook.code_width
        self.codebook_sizes = [config.codebook.codebook_size] * len(self.scales)
        self.project = nn.Linear(in_width, self.code_width)
        codebook = _CODEBOOKS[config.codebook.kind]
        if config.codebook_per_scale:
            self.codebooks = nn.ModuleList(codebook(config.codebook) for _ in self.scales)
        else:
            self.codebook = codebook(config.codebook)
            self.codebook.calls = len(self.scales)
        count = min(config.convolutions, len(self.scales))
        self.convolutions = nn.ModuleList(_Blend(self.code_width) for _ in range(count))
        self.register_buffer("mean", torch.zeros(len(self.scales), self.code_width))
        self.register_buffer("square", torch.ones(len(self.scales)))
        self._moments: list[Tensor] = []  # of one step, [scales,D+1] for each micro-batch
        finest = self.scales[-1]
        for i, side in enumerate(self.scales):
            self.register_buffer(f"down_{i}", resize_matrix(finest, side, "area"), persistent=False)
            self.register_buffer(f"up_{i}", resize_matrix(side, finest, "bicubic"), persistent=False)

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        side = max(height, width)
        if height != width:
            raise UserError(
                f"multiscale: its grids are square, found {height}×{width} positions: set a square image size"
            )
        if side != self.scales[-1]:
            raise UserError(
                f"multiscale: expected the last of scales to be {side}, the positions on a side that the encoder gives"
                f" images of this size, found {self.scales[-1]}: change scales, the image size, widths or patch_size"
            )
        return [(scale, scale) for scale in self.scales]

    def _quantize(self, features_BNC: Tensor, step: int) -> Quantized:
        z = self._project(features_BNC)
        losses: list[Tensor] = []
        moments: list[Tensor] = []

        def nearest(grid: int, left_BnD: Tensor) -> Tensor:
            moments.append(torch.cat([left_BnD.mean((0, 1)), left_BnD.square().mean()[None]]))
            return self._restored(grid, self._book(grid)(self._standard(grid, left_BnD)))

        def loss(so_far: Tensor) -> None:
            pulled = self.config.codebook.commitment_weight * F.mse_loss(z, so_far.detach())
            losses.append(pulled + self.config.codebook.codebook_weight * F.mse_loss(so_far, z.detach()))

        made = self._sum_of_grids(nearest, z, loss)
        if self.training:
            self._moments.append(torch.stack(moments))
        error = (z - made).detach().square().mean() / z.detach().square().mean()
        seen = z + (made - z).detach()  # straight through
        return Quantized(_positions(seen), torch.stack(losses).mean(), {"quantization_error": error})

    def _codes(self, features_BNC: Tensor) -> list[Tensor]:
        codes: list[Tensor] = []

        def nearest(grid: int, left_BnD: Tensor) -> Tensor:
            codes.append(self._book(grid).nearest(self._standard(grid, left_BnD)))
            return self._looked_up(grid, codes[-1])

        self._sum_of_grids(nearest, self._project(features_BNC))
        return codes

    def _vectors(self, codes: list[Tensor]) -> Tensor:
        return _positions(self._sum_of_grids(lambda grid, _: self._looked_up(grid, codes[grid]), None))

    def _books(self) -> list[Codebook]:
        """One for each grid, or one for all."""
        return cast("list[Codebook]", list(self.codebooks) if self.config.codebook_per_scale else [self.codebook])

    def _book(self, grid: int) -> Codebook:
        books = self._books()
        return books[grid % len(books)]

    def _project(self, features_BNC: Tensor) -> Tensor:
        """z, [B,D,h,w]."""
        z_BND: Tensor = self.project(features_BNC)
        return z_BND.transpose(1, 2).unflatten(2, (self.scales[-1], self.scales[-1]))

    def _looked_up(self, grid: int, codes_Bn: Tensor) -> Tensor:
        return self._restored(grid, F.embedding(codes_Bn, self._book(grid).vectors()))

    def _standard(self, grid: int, left_BnD: Tensor) -> Tensor:
        return (left_BnD - self.mean[grid]) / self._deviations()[grid]

    def _restored(self, grid: int, e_BnD: Tensor) -> Tensor:
        return e_BnD * self._deviations()[grid] + self.mean[grid]

    def _deviations(self) -> Tensor:
        """[scales]."""
        return (self.square - self.mean.square().mean(1)).clamp_min(1e-8).sqrt()

    def _sum_of_grids(
        self,
        vectors_of: Callable[[int, Tensor], Tensor],
        z_BDhw: Tensor | None,
        after: Callable[[Tensor], None] = lambda so_far: None,
    ) -> Tensor:
        """f̂ [B,D,h,w]. `vectors_of`: a grid and what is left of z there, [B,n,D] (empty without z), to its vectors.

        `after` gets f̂_k of each grid.
        """
        so_far: Tensor | None = None
        for grid, side in enumerate(self.scales):
            left = torch.empty(0)
            if z_BDhw is not None:
                rest = z_BDhw.detach() if so_far is None else (z_BDhw - so_far).detach()
                left = _positions(_resized(rest, self.get_buffer(f"down_{grid}")))
            e_BDss = vectors_of(grid, left).transpose(1, 2).unflatten(2, (side, side))
            term = self._blended(grid, _resized(e_BDss, self.get_buffer(f"up_{grid}")))
            so_far = term if so_far is None else so_far + term
            after(so_far)
        assert so_far is not None
        return so_far

    def _blended(self, grid: int, x_BDhw: Tensor) -> Tensor:
        if not len(self.convolutions):
            return x_BDhw
        blended: Tensor = self.convolutions[grid * len(self.convolutions) // len(self.scales)](x_BDhw)
        return blended

    def learned_codebooks(self) -> list[nn.Parameter]:
        return [book.embedding for book in self._books() if isinstance(book, GradientCodebook)]

    def averaged_codebooks(self) -> list[Tensor]:
        return [self.mean, self.square, *(book.embedding for book in self._books() if isinstance(book, EmaCodebook))]

    def forget(self) -> None:
        for book in self._books():
            book.forget()
        self._moments = []

    @torch.no_grad()
    def after_update(self, applied: bool | Tensor) -> None:
        found, self._moments = self._moments, []
        if not found:
            return
        moments, books = distributed.mean_tensor(torch.stack(found).mean(0)), self._books()
        if books[0].has_started:
            for book in books:
                book.after_update(applied)
            self._follow(moments, self.config.codebook.decay, torch.as_tensor(applied, device=moments.device))
            return
        seen = [vectors for book in books if (vectors := book.forget()) is not None]
        if seen and applied:
            self._start(torch.cat(seen), moments)

    def _start(self, z_nD: Tensor, moments: Tensor) -> None:
        """From the first step's vectors, grid by grid, standardised by its own moments. Collective."""
        positions = [side**2 for side in self.scales]
        images = len(z_nD) // sum(positions)
        grids = z_nD.split([images * count for count in positions])
        self._follow(moments, 0.0, torch.ones((), dtype=torch.bool, device=moments.device))
        standard, books = [self._standard(grid, vectors) for grid, vectors in enumerate(grids)], self._books()
        for book, vectors in zip(books, standard if len(books) > 1 else [torch.cat(standard)], strict=True):
            book.start(vectors)

    def _follow(self, moments: Tensor, decay: float, applied: Tensor) -> None:
        for average, value in ((self.mean, moments[:, :-1]), (self.square, moments[:, -1])):
            average.copy_(torch.where(applied, torch.lerp(value, average, decay), average))


class _Blend(nn.Module):
    """φ: half of x, half of its 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BDhw: Tensor) -> Tensor:
        return 0.5 * x_BDhw + 0.5 * cast(Tensor, self.conv(x_BDhw))


def _resized(x_BDhw: Tensor, matrix: Tensor) -> Tensor:
    return matrix @ x_BDhw @ matrix.T


def _positions(x_BDhw: Tensor) -> Tensor:
    """[B,N,D], row by row."""
    return x_BDhw.flatten(2).transpose(1, 2)
