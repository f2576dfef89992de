"""The moving average of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Ema:
    """Exponential moving average of a model's parameters, and of codebooks that follow them, in float32.

    The decay ramps up as (1 + t) / (10 + t), so that the average forgets the initial weights. `local_parameters` gives
    the float32 weights that this process updates, with ZeRO its slice of them; the average is sharded alike.
    """

    def __init__(self, local_parameters: Callable[[], dict[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self._local_parameters = local_parameters
        # Row-major, whatever the layout of the weights: safetensors saves no other.
        self.average = {
            name: values.detach().float().clone(memory_format=torch.contiguous_format)
            for name, values in local_parameters().items()
        }
        device = next((values.device for values in self.average.values()), None)
        self._updates = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def updates(self) -> int:
        """Updates that were applied; reading it waits for the device."""
        return int(self._updates)

    @updates.setter
    def updates(self, updates: int) -> None:
        self._updates.fill_(updates)

    @torch.no_grad()
    def update(self, applied: Tensor | bool = True) -> None:
        """Move the average towards the parameters, once per optimizer update; not at all if it was not `applied`.

        Nothing here waits for the device.
        """
        applied = torch.as_tensor(applied, device=self._updates.device)
        self._updates += applied
        decay = torch.clamp((1 + self._updates) / (10 + self._updates), max=self.decay)
        share = ((1 - decay) * applied).float()
        for name, values in self._local_parameters().items():
            self.average[name].lerp_(values, share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and parameters, one tensor at a time: no second copy of the model is made."""
        for name, values in self._local_parameters().items():
            before = values.clone()
            values.copy_(self.average[name])
            self.average[name].copy_(before)
