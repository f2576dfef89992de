"""The optimizers: AdamW and Muon, and which parameters each of them trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError


def set_learning_rates(optimizer: Any, factor: float) -> None:
    """Each parameter group's learning rate becomes `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def build_adamw(module: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices and kernels only, not on gains, biases, scales.

    A parameter that carries a `learning_rate_scale` (muP sets it) learns at so many times the config's rate; a
    submodule that learns against the rest (`adversaries`) has a group of its own, without weight decay.
    """
    apart = adversaries(module)
    own = {id(p) for adversary in apart for p in adversary.parameters()}
    parameters = [p for p in module.parameters() if p.requires_grad and id(p) not in own]
    groups = _adamw_groups([p for p in parameters if p.ndim >= 2], config, config.weight_decay)
    groups += _adamw_groups([p for p in parameters if p.ndim < 2], config, 0.0)
    for adversary in apart:
        settings: Any = adversary.adamw
        rate = config.learning_rate * settings["learning_rate_ratio"]
        for group in _adamw_groups(list(adversary.parameters()), config, 0.0):
            groups.append(group | {"lr": rate, "initial_lr": rate, "betas": settings["betas"]})
    return torch.optim.AdamW(groups, fused=True)


def adversaries(module: nn.Module) -> list[nn.Module]:
    """Submodules with settings of their own for AdamW, `adamw = {"learning_rate_ratio": …, "betas": …}`."""
    return [part for part in module.modules() if isinstance(getattr(part, "adamw", None), dict)]


def build_muon(module: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) on the matrices of the module's blocks, AdamW on embeddings, heads and vectors.

    DeepSpeed's implementation, which its ZeRO optimizers know: a matrix may be spread over processes. Muon's steps
    have a fixed size, so a clipped gradient norm would only map_pixels them all: clipping is AdamW's business.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # its kernels are torch.compile'd, which on a CPU costs a C++ compiler and half a minute
        torch.compiler.set_stance("force_eager")
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        parameter.use_muon = parameter.ndim == 2 and "blocks." in name  # type: ignore[attr-defined]
        (matrices if parameter.use_muon else rest).append(parameter)  # type: ignore[attr-defined]
    if not matrices:
        raise UserError(
            "optimizer muon needs a model with matrices in blocks, found none: set training.optimizer=adamw"
        )
    muon_group = {
        "params": matrices,
        "use_muon": True,
        "lr": config.muon_learning_rate,
        "initial_lr": config.muon_learning_rate,
        "momentum": 0.95,
        "weight_decay": config.weight_decay,
        "ns_method": "standard" if on_cpu else "gram",
    }
    groups = [muon_group, *(group | {"use_muon": False} for group in _adamw_groups(rest, config, 0.0))]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True}
    )
    return optimizer


def _adamw_groups(parameters: list[nn.Parameter], config: TrainingConfig, weight_decay: float) -> list[dict[str, Any]]:
    """A group for each learning rate. AdamW decays by rate * decay, which is the same for all."""
    by_scale: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_scale.setdefault(getattr(parameter, "learning_rate_scale", 1.0), []).append(parameter)
    return [
        {
            "params": chosen,
            "lr": config.learning_rate * scale,
            "initial_lr": config.learning_rate * scale,
            "betas": config.betas,
            "eps": 1e-8,
            "weight_decay": weight_decay / scale,
        }
        for scale, chosen in by_scale.items()
    ]
