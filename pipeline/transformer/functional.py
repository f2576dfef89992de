"""Two functions whose derivatives are written by hand, because training spends its time in them.

Steps of `benchmarks/transformer.py` are a third longer without them (docs/transformer.md, "Speed"): PyTorch's RMSNorm
on CPUs is a chain of float32 operations, and its cross-entropy keeps and copies the logits of all positions in float32.
`tests/transformer/test_functional.py` holds both against automatic differentiation.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits in float32 at one time: few enough for a CPU's cache, enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}


class _Context(Protocol):
    """What autograd hands from the forward pass to the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    weight_dtype: torch.dtype

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; in the precision of x, the mean square in float32.

    Zhang & Sennrich 2019. Forward and backward of [8, 288, 256] in bf16 on two CPU threads: 1.4 ms, `F.rms_norm` 3.5.
    """
    normalized: Tensor = _RMSNorm.apply(x, weight, eps)
    return normalized


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_at_least_float32(x.dtype))
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        unit, scale = x * inverse, weight.to(x.dtype)
        ctx.save_for_backward(unit, inverse, scale)
        ctx.weight_dtype = weight.dtype
        return unit * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, inverse, scale = ctx.saved_tensors
        product = (unit * gradient).reshape(-1, len(scale))
        along = torch.mv(product, scale).view_as(inverse).div_(-len(scale))
        of_x = torch.addcmul(gradient * scale, unit, along).mul_(inverse)
        return of_x, product.sum(0).to(ctx.weight_dtype), None


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of each target, with label smoothing and z-loss, and the plain cross-entropy (no gradient), in nats.

    `hidden` [..., D], `weight` [V, D] of its dtype, `targets` int64 [...]; both losses [...], at least float32. The
    logits are hidden weight^T, some positions at a time; kept is one tensor of their size and dtype, the gradient:

        loss = (1 - smoothing) * (log Z - logit of target) + smoothing * (log Z - mean logit) + z_loss * log² Z
        its gradient = (1 + 2 z_loss log Z) * softmax - (1 - smoothing) * one-hot - smoothing / V
    """
    total, plain = _CrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.flatten(), smoothing, z_loss
    )
    return total.view_as(targets), plain.view_as(targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        ids = len(weight)
        rows = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**21) // ids)
        gradients = hidden.new_empty(len(hidden), ids)
        workspace = hidden.new_empty(min(rows, len(hidden)), ids, dtype=_at_least_float32(hidden.dtype))
        totals, plains = [], []
        for inputs, target, gradient in zip(
            hidden.split(rows), targets[:, None].split(rows), gradients.split(rows), strict=True
        ):
            logits = workspace[: len(inputs)].copy_(torch.mm(inputs, weight.T, out=gradient))
            highest, of_target = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
            mean = logits.mean(dim=-1, keepdim=True) if smoothing else of_target
            powers = logits.sub_(highest).exp_()
            sums = powers.sum(dim=-1, keepdim=True)
            log_z = highest + sums.log()
            plain = log_z - of_target
            totals.append(plain + smoothing * (of_target - mean) + z_loss * log_z.square())
            plains.append(plain)
            powers.mul_((1 + 2 * z_loss * log_z) / sums)
            powers.scatter_add_(1, target, powers.new_full((), smoothing - 1).expand_as(target))
            gradient.copy_(powers.sub_(smoothing / ids) if smoothing else powers)
        ctx.save_for_backward(hidden, weight, gradients)
        losses = torch.cat(totals)[:, 0], torch.cat(plains)[:, 0]
        ctx.mark_non_differentiable(losses[1])
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, of_total: Tensor, _of_plain: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scales the rows of the kept gradient by `of_total`, in the smaller factors of the products."""
        hidden, weight, gradients = ctx.saved_tensors
        of_total = of_total[:, None]
        of_hidden = (torch.mm(gradients, weight) * of_total).to(hidden.dtype)
        of_weight = torch.mm(gradients.T, (hidden * of_total).to(hidden.dtype))
        return of_hidden, of_weight, None, None, None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
