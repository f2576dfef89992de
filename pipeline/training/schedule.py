"""The learning-rate schedule as a pure function of the step: the one place that knows it."""

from __future__ import annotations

import math

from pipeline.config.training import TrainingConfig


def learning_rate_factor(config: TrainingConfig, step: int) -> float:
    """Learning rate at 0-based `step` / its peak, in [0, 1].

    Linear warm-up over `warmup_steps`, then one of: cosine (Loshchilov and Hutter 2017, without restarts);
    warmup-stable-decay (Hu et al. 2024, section 4), linear over the last `decay_fraction` of the steps; constant.
    """
    final = config.final_learning_rate_ratio
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    decay_steps = max(round(config.steps * config.decay_fraction), 1)
    left = (config.steps - step) / decay_steps
    return final + (1 - final) * min(max(left, 0.0), 1.0)
