"""CUDA tensors without a GPU: shapes, dtypes and devices, no data, on builds of torch without CUDA, too.

model = Transformer(layout, shape)
with fake_cuda():
    to_fake_cuda(model)
    with torch.autocast("cuda", torch.bfloat16):
        loss = ...            # as on a GPU
    loss.backward()

Three things are stand-ins. Autocast's casts are made here, from the lists in torch's own header, because C++ has to
take the tensors for meta tensors. `F.scaled_dot_product_attention`, `F.rms_norm` and `F.silu` choose their kernels by
what torch was built for; here they run one operation forward and one backward, as on a GPU. Both are seen only where
Python calls them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Inside, tensors are fake, those on "cuda" take the GPU's path, and `torch.autocast("cuda", …)` works."""
    autocast = _Autocast()
    with ExitStack() as stack:
        stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", _flash_attention))
        stack.enter_context(patch.object(F, "rms_norm", _rms_norm))
        stack.enter_context(patch.object(F, "silu", _silu))
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda: True))
        stack.enter_context(patch("torch.clear_autocast_cache", autocast.cast_weights.clear))
        # Else `torch.autograd.backward` takes the mode off while it works, and what is recomputed there is not cast.
        stack.enter_context(patch("torch.autograd.has_torch_function", lambda _: False))
        stack.enter_context(autocast)
        yield


def to_fake_cuda(module: nn.Module, dtype: torch.dtype | None = None, device: str = "cuda") -> None:
    """Inside `fake_cuda`: parameters and buffers become fake tensors of `device`, floating-point ones of `dtype`."""
    made: dict[int, Tensor] = {}  # a tensor that two modules share stays one
    for part in module.modules():
        for own in (vars(part)["_parameters"], vars(part)["_buffers"]):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made.setdefault(id(tensor), _fake(tensor, dtype, device))


def _fake(tensor: Tensor, dtype: torch.dtype | None, device: str) -> Tensor:
    kept = dtype is None or not tensor.is_floating_point()
    fake = torch.empty(tensor.shape, dtype=tensor.dtype if kept else dtype, device=device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """C++ takes fake CUDA tensors for meta tensors: without CUDA's own parts, autograd's engine ends the process."""

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[Any],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = dict(kwargs or {})
        asked = args[0] if func is torch.ops.prim.device.default else None
        if isinstance(asked, FakeTensor) and asked.fake_device.type == "cuda":
            return torch.device("meta")
        if kwargs.get("device") == torch.device("meta"):  # C++ makes a tensor like one of these
            kwargs["device"] = torch.device("cuda")
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Autocast(TorchFunctionMode):
    """What `torch.autocast("cuda")` does to the operations that Python calls, by torch's lists of them."""

    _NAMES = {"__matmul__": "matmul", "__rmatmul__": "matmul", "__pow__": "pow", "cross_entropy": "nll_loss_nd"}

    def __init__(self) -> None:
        super().__init__()
        self.cast_weights: dict[int, tuple[Tensor, Tensor]] = {}  # autocast casts a leaf once; by id, with the leaf

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cuda") and "out" not in kwargs:
            name = self._NAMES.get(name, name)
            if name in _listed("LOWER_PRECISION_FP"):
                args, kwargs = tree_map_only(Tensor, self._lower, (args, kwargs))
            elif name in _listed("FP32") | _listed("FP32_SET_OPT_DTYPE"):
                args, kwargs = tree_map_only(Tensor, lambda x: x.float() if _eligible(x) else x, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda")
        if not _eligible(x) or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad and x.dtype == torch.float32 and torch.is_autocast_cache_enabled()):
            return x.to(dtype)
        if id(x) not in self.cast_weights:
            self.cast_weights[id(x)] = x, x.to(dtype)
        return self.cast_weights[id(x)][1]


def _eligible(x: Tensor) -> bool:
    return x.device.type == "cuda" and x.is_floating_point() and x.dtype != torch.float64


@cache
def _listed(kind: str) -> frozenset[str]:
    """The operations in a list of ATen/autocast_mode.h."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    found = re.search(rf"#define AT_FORALL_{kind}\(_\)((?:.*\\\n)*.*)", header)
    assert found, f"no list of {kind} in torch's header of autocast"
    return frozenset(re.findall(r"_\((\w+)", found[1]))


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Masks are not among FlashAttention's inputs; they change no count."""
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"expected one dtype of query, key and value, found {query.dtype, key.dtype, value.dtype}")
    flash = _aten._scaled_dot_product_flash_attention
    mixed: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return mixed


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        x, weight = x.float(), None if weight is None else weight.float()
    if weight is not None and weight.dtype != x.dtype:
        return torch.rms_norm(x, list(shape), weight, eps)  # on a GPU, too, this is not fused
    fused: Callable[..., Tensor] = _FusedRMSNorm.apply
    return fused(x, list(shape), weight, 1e-6 if eps is None else eps)


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    apply: Callable[..., Tensor] = _Silu.apply
    return apply(x)


class _Context(Protocol):
    """What autograd hands from the forward pass to the backward pass."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    shape: list[int]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _FusedRMSNorm(torch.autograd.Function):
    """LayerNorm's two operations: their inputs, outputs and what is kept between them have the same shapes."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, shape: list[int], weight: Tensor | None, eps: float) -> Tensor:
        out: Tensor
        x = x.contiguous()  # as the kernel has it, backward, too
        out, _, inverse = _aten.native_layer_norm(x, shape, weight, None, eps)
        ctx.shape = shape
        ctx.save_for_backward(x, inverse, weight)
        return out

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, inverse, weight = ctx.saved_tensors
        needed = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[2], False]
        of_x, of_weight, _ = _aten.native_layer_norm_backward(
            gradient.contiguous(), x, ctx.shape, inverse, inverse, weight, None, needed
        )
        return of_x, None, of_weight, None


class _Silu(torch.autograd.Function):
    """GELU's operations in place of SiLU's, for the same reason."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = _aten.silu(x)
        return out

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> Tensor:
        out: Tensor = _aten.gelu_backward(gradient, *ctx.saved_tensors)
        return out
