"""How much memory the passes of a training step take: live tensors, counted on fake ones.

    with fake_cuda():
        found = passes(objective, batch, "bf16-weights")     # `objective` and `batch` on "cuda", or on the CPU

The objective runs forward and backward as it is, with whatever it recomputes, so the count follows the model. What an
engine keeps beside that is in `gpu_plan.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config.training import Precision
from pipeline.core.objective import Objective

AUTOCAST = {
    "bf16": torch.bfloat16,
    "bf16-autocast": torch.bfloat16,
    "fp16": torch.float16,
}


class LiveBytes(TorchDispatchMode):
    """Inside, `now` is the size of all tensors that were made inside and still exist, and `peak` its maximum.

    `if_kept` is the maximum with what left through `leave`, as if that had stayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.if_kept = 0
        self._left = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[Any],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and func.namespace != "prim":
                self._add(tensor.untyped_storage())
        return made

    def know(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before, nor its views."""
        storage = tensor.untyped_storage()
        self._alive[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata, 0))

    def leave(self, parameter: Tensor) -> None:
        """Drop the gradient of a parameter."""
        before = self.now
        parameter.grad = None
        self._left += before - self.now

    def peaks_start_anew(self) -> None:
        """From what there is now."""
        self.peak, self.if_kept = self.now, self.now + self._left

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            size = storage.nbytes()
            self._alive[storage._cdata] = weakref.ref(storage, partial(self._forget, storage._cdata, size))
            self.now += size
            self.peak = max(self.peak, self.now)
            self.if_kept = max(self.if_kept, self.now + self._left)

    def _forget(self, key: int, size: int, _: object) -> None:
        self._alive.pop(key, None)
        self.now -= size


@dataclass(frozen=True)
class Passes:
    """Bytes beside the weights, on one micro-batch."""

    kept: int  # at the end of the forward pass: what the backward pass needs
    before_gradients: int  # at the peak until the first gradient is there
    with_gradients: int  # at the peak from then on, if gradients stay
    without_gradients: int  # at the peak from then on, if each one leaves as soon as it is there
    evaluation: int  # at the peak of a forward pass in eval mode


def passes(objective: Objective, batch: dict[str, Tensor], precision: Precision) -> Passes:
    """Run the objective's passes on fake tensors, with activation checkpointing where it is built in already."""
    objective.train()
    before_gradients: list[int] = []

    def has_gradient(parameter: Tensor) -> None:
        if not before_gradients:
            before_gradients.append(live.peak)
            live.peaks_start_anew()
        live.leave(parameter)

    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(has_gradient) for parameter in trained]
    with _counted(objective, batch, precision) as live:
        loss, metrics = objective(batch, 0)
        kept = live.now
    with live:
        torch.autograd.backward(loss)  # the tensor's method recomputes outside fake_cuda's autocast
    for handle in handles:
        handle.remove()
    del loss, metrics
    objective.eval()
    with _counted(objective, batch, precision) as evaluation, torch.no_grad():
        objective(batch, 0)
    objective.train()
    return Passes(kept, before_gradients[0], live.if_kept, live.peak, evaluation.peak)


@contextmanager
def _counted(objective: Objective, batch: dict[str, Tensor], precision: Precision) -> Iterator[LiveBytes]:
    live = LiveBytes()
    for tensor in (*objective.parameters(), *objective.buffers(), *batch.values()):
        live.know(tensor)
    device = next(iter(batch.values())).device.type
    autocast = torch.autocast(device, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()
    with live, autocast:
        yield live
