"""In which precision a piece of code computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dtypes(TorchDispatchMode):
    """The floating-point dtypes of results on a device, by operation."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        there = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.device.type == self.device]
        dtypes = {x.dtype for x in there if x.is_floating_point()}
        self.found.setdefault(func.overloadpacket.__name__, set()).update(dtypes)
        return result
