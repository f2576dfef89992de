"""Fails where a program would wait for the GPU: `.item()`, `nonzero`, a copy to the CPU, a branch on a tensor.

with no_sync():            # fake CUDA tensors (pipeline/core/fake_cuda.py), or real ones
    loss, _ = objective(batch, 0)
    loss.backward()
with no_sync("cpu"):       # CPU tensors stand for those of a GPU
    ...

Copies from one device to the other are allowed with `non_blocking=True`. `Tensor.cpu`, `tolist` and `numpy` are refused
by name, because CPU tensors answer them without an operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
_REFUSED = {Tensor.cpu, Tensor.tolist, Tensor.numpy}


class HostSync(AssertionError):
    """The host would wait for the device here: see the traceback."""


@contextmanager
def no_sync(device: str = "cuda") -> Iterator[None]:
    """Inside, an operation that makes the host wait for tensors of `device` raises HostSync."""
    with _Operations(device), _Methods():
        yield


class _Operations(TorchDispatchMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func.namespace != "prim" and (reason := self._why_it_waits(func.overloadpacket.__name__, args, kwargs)):
            raise HostSync(f"{func} {reason}")
        return func(*args, **kwargs)

    def _why_it_waits(self, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> str | None:
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if name == "_to_copy" and kwargs.get("device") is not None:
            devices.add(torch.device(str(kwargs["device"])).type)
        if self.device not in devices:
            return None
        if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return f"makes the host wait for a value on {self.device}"
        if name in {"index", "index_put", "index_put_", "_index_put_impl_"} and _counts_a_mask(name, args):
            return "with a mask as index makes the host wait for the number of elements that are true"
        unblocked = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        if name in {"_to_copy", "copy_"} and "cpu" in devices and len(devices) > 1 and not unblocked:
            return f"is a copy between {' and '.join(sorted(devices))} that the host waits for"
        return None


def _counts_a_mask(name: str, args: tuple[object, ...]) -> bool:
    masks = [index for index in tree_leaves(args[1]) if isinstance(index, Tensor) and index.dtype == torch.bool]
    filled_with_one_value = name != "index" and isinstance(args[2], Tensor) and args[2].numel() == 1
    return bool(masks) and not filled_with_one_value


class _Methods(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict | None = None,
    ) -> object:
        kwargs = kwargs or {}
        to_cpu = (
            func is Tensor.to and not kwargs.get("non_blocking") and any(map(_is_cpu, chain(args[1:], kwargs.values())))
        )
        if func in _REFUSED or to_cpu:
            raise HostSync(f"Tensor.{func.__name__} copies to the CPU, and the host waits for it")
        return func(*args, **kwargs)


def _is_cpu(value: object) -> bool:
    # By its name: a torch.device is the one of another tensor, or this process's, where CPU tensors stand for a GPU's.
    return isinstance(value, str) and value.split(":")[0] == "cpu"
