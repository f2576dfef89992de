"""The moving average of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Ema:
    """Exponential moving average of a model's parameters, in float32.

    The decay ramps up as (1 + t) / (10 + t), so that the average forgets the initial weights. `held` gives what this
    process holds of each parameter, which under ZeRO-3 is a shard; the average holds as much.
    """

    def __init__(self, held: Callable[[], dict[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._held = held
        # Rows first in memory, whatever the layout of the weights: safetensors saves no other.
        packed = torch.contiguous_format
        self.average = {name: values.detach().float().clone(memory_format=packed) for name, values in held().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [values.float() for values in self._held().values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def swap_in(self) -> dict[str, Tensor]:
        """Put the average into the parameters; returns what they held, for `put`."""
        before = {name: values.clone() for name, values in self._held().items()}
        self.put(self.average)
        return before

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._held().items():
            parameter.copy_(values[name])
