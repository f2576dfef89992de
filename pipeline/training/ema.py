"""The moving average of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Ema:
    """Exponential moving average of a model's parameters, in float32.

    The decay ramps up as (1 + t) / (10 + t), so that the average forgets the initial weights. `local_parameters` gives
    the memory of each parameter on this process, which under ZeRO-3 is a flat shard; the average is sharded alike.
    """

    def __init__(self, local_parameters: Callable[[], dict[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._local_parameters = local_parameters
        # Row-major, whatever the layout of the weights: safetensors saves no other.
        self.average = {
            name: values.detach().float().clone(memory_format=torch.contiguous_format)
            for name, values in local_parameters().items()
        }

    @torch.no_grad()
    def update(self, applied: bool | Tensor = True) -> None:
        """Move the average towards the parameters, once per optimizer update that was `applied`."""
        if not applied:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [values.float() for values in self._local_parameters().values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def swap_in(self) -> dict[str, Tensor]:
        """Copy the average into the parameters; returns a copy of their values before, for `put`."""
        before = {name: values.clone() for name, values in self._local_parameters().items()}
        self.put(self.average)
        return before

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Copy `values` into the parameters."""
        for name, parameter in self._local_parameters().items():
            parameter.copy_(values[name])
