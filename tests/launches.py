"""Counts operations that would each be a kernel launch on a GPU: all but views, allocations and questions.

with Launches() as launches:
    loss, _ = objective(batch, 0)
    loss.backward()
assert launches.total <= 900, launches

On CPU tensors, and on the fake CUDA tensors of `pipeline/core/fake_cuda.py`, where the code takes its path for GPUs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# What touches no element, though its schema does not say so.
_FREE = ("empty", "new_empty", "_unsafe_view", "lift", "detach", "set_", "resize_", "promote_types", "sym_")


class Launches(TorchDispatchMode):
    """`total`, and `by_operation`: how often each ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_operation.total()

    def __repr__(self) -> str:
        return f"{self.total} launches: {dict(self.by_operation.most_common())}"

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[object, ...] = (), kwargs: dict | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and not func.is_view and not name.startswith(_FREE):
            self.by_operation[name] += 1
        return func(*args, **(kwargs or {}))
