"""The optimizer, its learning-rate schedule as a pure function of the step, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.train_config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of 0-based `step`: linear warm-up, then cosine, warm-up-stable-decay or constant."""
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_ratio
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    decay_steps = max(round(config.steps * config.decay_fraction), 1)
    left = (config.steps - step) / decay_steps
    return final + (peak - final) * min(max(left, 0.0), 1.0)


def build_optimizer(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices and kernels only, not on gains, biases, scales."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


class Ema:
    """Exponential moving average of a module's parameters, in float32.

    The decay ramps up as (1 + t) / (10 + t), so that the average forgets the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._parameters = dict(module.named_parameters())
        self.average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module's parameters hold the average."""
        saved = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.copy_to_module()
        try:
            yield
        finally:
            self._copy(saved)

    def copy_to_module(self) -> None:
        self._copy(self.average)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.updates = int(state["updates"])
        for name, average in self.average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
