"""The cross-entropy straight from hidden states: training and evaluation never hold all logits in float32.

losses = cross_entropy([Part(hidden, weight, targets)], smoothing=0.1, z_loss=1e-4)
losses.mean.backward()

(`F.linear_cross_entropy` of torch 2.13 has no z-loss, no loss of each position, and in bf16 sums the loss in bf16.) Its
derivatives are written by hand and held against automatic differentiation (`tests/transformer/test_functional.py`):

    loss = (1 - smoothing) * (log Z - logit of target) + smoothing * (log Z - mean logit) + z_loss * log² Z
    its gradient = (1 + 2 z_loss log Z) * softmax - (1 - smoothing) * one-hot - smoothing / V

Shapes: B batch, n positions, D width, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits in float32 at one time: few enough for a CPU's cache, enough to fill a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}


@dataclass(frozen=True)
class Part:
    """Targets, and the factors of their logits, hidden weight^T."""

    hidden: Tensor  # [B, n, D]
    weight: Tensor  # [V, D], of its dtype
    targets: Tensor  # int64 [B, n]


@dataclass(frozen=True)
class Losses:
    """In nats, at least float32."""

    mean: Tensor  # scalar, what is minimized
    plain: list[Tensor]  # of each part [B, n]: the cross-entropy alone, without a gradient
    right: list[Tensor]  # of each part bool [B, n]: is the target the likeliest? Empty where there are gradients


def cross_entropy(
    parts: Sequence[Part],
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    counted: Tensor | None = None,
    count: float | None = None,
) -> Losses:
    """Mean cross-entropy of all targets, with label smoothing and z-loss.

    What is kept for the backward pass: on GPUs the gradients of hidden states and weights; on CPUs the gradient of the
    logits, whose products then wait for the backward pass (as fast, and the bits of earlier versions); in float16, too,
    because sums over positions could overflow before the loss scale is known. Without gradients nothing.

    Args:
        counted: bool, like the targets of all parts together, [B, sum of n]: which of them count; None: all.
        count: what the sum of those that count is divided by; None: the number of targets.
    """
    if not torch.is_grad_enabled():
        totals, plain, right = map(
            list, zip(*(_without_gradient(part, smoothing, z_loss) for part in parts), strict=True)
        )
        return Losses(_mean(totals, counted, count), plain, right)
    if any(_keeps_gradient_of_logits(part.hidden) for part in parts):
        kept = [_Kept.apply(*_flat(part), smoothing, z_loss) for part in parts]
        totals = [total.view_as(part.targets) for part, (total, _) in zip(parts, kept, strict=True)]
        mean, plain = _mean(totals, counted, count), [own for _, own in kept]
    else:
        rows = _rows(parts, counted)
        sums = [_Accumulated.apply(*_flat(part), own, smoothing, z_loss) for part, own in zip(parts, rows, strict=True)]
        mean = sum(own for own, _ in sums) / (count or sum(part.targets.numel() for part in parts))
        plain = [own for _, own in sums]
    return Losses(mean, [own.view_as(part.targets) for own, part in zip(plain, parts, strict=True)], [])


def _rows(parts: Sequence[Part], counted: Tensor | None) -> Sequence[Tensor | None]:
    """Of each part's positions, flat, which count; None: all."""
    if counted is None:
        return [None] * len(parts)
    return [own.flatten() for own in counted.split([part.targets.shape[1] for part in parts], dim=1)]


def _mean(totals: Sequence[Tensor], counted: Tensor | None, count: float | None) -> Tensor:
    """Of losses [B, n] each, those that count."""
    losses = torch.cat(list(totals), dim=1)
    if counted is None:
        return losses.mean()
    return (losses * counted).sum() / (count or losses.numel())


def _keeps_gradient_of_logits(hidden: Tensor) -> bool:
    return hidden.device.type == "cpu" or hidden.dtype == torch.float16


def _flat(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B n, D], weight, targets [B n]."""
    return part.hidden.reshape(-1, part.hidden.shape[-1]), part.weight, part.targets.flatten()


def _chunks(hidden: Tensor, targets: Tensor, ids: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Some positions at a time, by `_CHUNK_ELEMENTS`: [rows, D], their targets [rows, 1], and which they are."""
    rows = max(1, _CHUNK_ELEMENTS.get(hidden.device.type, 2**21) // ids)
    for start in range(0, len(hidden), rows):
        chosen = slice(start, start + rows)
        yield hidden[chosen], targets[chosen, None], chosen


def _without_gradient(part: Part, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimized, the plain cross-entropy, and whether the target is the likeliest: [B, n] each."""
    hidden, weight, targets = _flat(part)
    found = []
    for inputs, target, _ in _chunks(hidden, targets, len(weight)):
        product = torch.mm(inputs, weight.T)
        right = product.argmax(dim=-1, keepdim=True) == target
        total, plain, *_ = _losses(product.to(_at_least_float32(product.dtype)), target, smoothing, z_loss)
        found.append((total, plain, right))
    total, plain, right = (torch.cat(values).view_as(part.targets) for values in zip(*found, strict=True))
    return total, plain, right


def _losses(logits: Tensor, target: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is minimized, the plain cross-entropy, log Z, and the sum of what `logits` become, exp(logits - highest).

    All four [rows, 1].
    """
    highest, of_target = logits.amax(dim=-1, keepdim=True), logits.gather(1, target)
    mean = logits.mean(dim=-1, keepdim=True) if smoothing else of_target
    sums = logits.sub_(highest).exp_().sum(dim=-1, keepdim=True)
    log_z = highest + sums.log()
    total = plain = log_z - of_target
    if smoothing:
        total = total + smoothing * (of_target - mean)
    if z_loss:
        total = total + z_loss * log_z.square()
    return total, plain, log_z, sums


def _losses_and_gradient(logits: Tensor, target: Tensor, smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """What is minimized and the plain cross-entropy: [rows, 1]. `logits` become the gradient of the former."""
    total, plain, log_z, sums = _losses(logits, target, smoothing, z_loss)
    logits.mul_((1 + 2 * z_loss * log_z) / sums if z_loss else sums.reciprocal())
    logits.scatter_add_(1, target, logits.new_full((), smoothing - 1).expand_as(target))
    if smoothing:
        logits.sub_(smoothing / logits.shape[1])
    return total, plain


class _Context(Protocol):
    """What autograd hands from the forward pass to the backward pass."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _Kept(torch.autograd.Function):
    """The losses of n positions; keeps the gradient of the logits, [n, V] of their dtype."""

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        gradients = hidden.new_empty(len(hidden), len(weight))
        workspace: Tensor | None = None  # one for all chunks: on CPUs memory that was not used before is slow
        found = []
        for inputs, target, chosen in _chunks(hidden, targets, len(weight)):
            gradient = torch.mm(inputs, weight.T, out=gradients[chosen])
            if workspace is None:
                workspace = torch.empty_like(gradient, dtype=_at_least_float32(gradient.dtype))
            logits = workspace[: len(inputs)].copy_(gradient)
            found.append(_losses_and_gradient(logits, target, smoothing, z_loss))
            gradient.copy_(logits)
        ctx.save_for_backward(hidden, weight, gradients)
        total, plain = (torch.cat(values)[:, 0] for values in zip(*found, strict=True))
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, of_total: Tensor, _of_plain: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scales the rows of the kept gradient by `of_total`, in the smaller factors of the products."""
        hidden, weight, gradients = ctx.saved_tensors
        of_total = of_total[:, None]
        of_hidden = (torch.mm(gradients, weight) * of_total).to(hidden.dtype)
        of_weight = torch.mm(gradients.T, (hidden * of_total).to(hidden.dtype))
        return of_hidden, of_weight, None, None, None


class _Accumulated(torch.autograd.Function):
    """The sum of the losses that count, of n positions; keeps the gradients of hidden states and weights alone."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        counted: Tensor | None,
        smoothing: float,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight = torch.empty_like(hidden), None
        found = []
        for inputs, target, chosen in _chunks(hidden, targets, len(weight)):
            gradient = torch.mm(inputs, weight.T)
            logits = gradient.to(_at_least_float32(gradient.dtype))
            total, plain = _losses_and_gradient(logits, target, smoothing, z_loss)
            if counted is not None:
                logits.mul_(counted[chosen, None])
                total = total * counted[chosen, None]
            found.append((total, plain))
            gradient.copy_(logits)
            torch.mm(gradient, weight, out=of_hidden[chosen])
            product = torch.mm(gradient.T, inputs)
            if len(inputs) < len(hidden):  # several chunks: their sum in float32
                product = product.to(logits.dtype)
            of_weight = product if of_weight is None else of_weight.add_(product)
        assert of_weight is not None
        ctx.save_for_backward(of_hidden, of_weight)
        totals, plain = (torch.cat(values)[:, 0] for values in zip(*found, strict=True))
        ctx.mark_non_differentiable(plain)
        return totals.sum(), plain

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, of_sum: Tensor, _of_plain: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return of_hidden * of_sum, (of_weight * of_sum).to(of_hidden.dtype), None, None, None, None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
