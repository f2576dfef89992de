"""Functions whose derivatives are written by hand, because training spends its time in them.

PyTorch's RMSNorm on CPUs is a chain of float32 operations: with it and with PyTorch's cross-entropy in place of
`cross_entropy.py`'s, steps of `benchmarks/transformer.py` are a third longer (docs/transformer.md, "Speed").
`tests/transformer/test_functional.py` holds both against automatic differentiation.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Context(Protocol):
    """What autograd hands from the forward pass to the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    weight_dtype: torch.dtype

    def save_for_backward(self, *tensors: Tensor) -> None: ...


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


def swiglu(gate_value: Tensor) -> Tensor:
    """silu(gate) * value (Shazeer 2020), the two halves of the last dimension: [..., 2 H] -> [..., H].

    The gradient is written into its two halves, where autograd would make each, and copy both.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        gate, value = gate_value.chunk(2, dim=-1)
        return F.silu(gate) * value
    gated: Tensor = _SwiGLU.apply(gate_value)
    return gated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, gate_value: Tensor) -> Tensor:
        gate, value = gate_value.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_value, activated)
        return activated * value

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, gradient: Tensor) -> Tensor:
        gate_value, activated = ctx.saved_tensors
        gate, value = gate_value.chunk(2, dim=-1)
        of_both = torch.empty_like(gate_value)
        of_gate, of_value = of_both.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        torch.mul(gradient, activated, out=of_value)
        return of_both


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
