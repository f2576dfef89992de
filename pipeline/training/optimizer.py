"""The optimizers: AdamW and Muon, and which parameters each of them trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.config.training import TrainingConfig
from pipeline.core.errors import UserError
from pipeline.core.objective import Objective, ParameterGroup
from pipeline.training.precision import cpus_have_bf16

_Settings = dict[str, object]  # a parameter group as torch's optimizers take it


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each parameter group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def skip_unless(applied: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make the next step of a replicated optimizer change nothing where the scalar `applied` is false.

    The kernels read it on the device, as they read what torch's GradScaler finds: the host waits for nothing.
    """
    vars(optimizer)["found_inf"] = applied.logical_not().float()


def build_optimizer(objective: Objective, config: TrainingConfig, replicated: bool = False) -> torch.optim.Optimizer:
    """The optimizer that `config.optimizer` names, for all of the objective's parameters.

    `replicated`: every process has and updates all of them, and `skip_unless` works on it.
    """
    if config.optimizer == "muon":
        return build_muon(objective, config, replicated)
    return build_adamw(objective.parameter_groups(), config)


def build_adamw(groups: Sequence[ParameterGroup], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); weight decay on matrices and kernels only.

    Not on gains, biases, scales, and what a group names as undecayed: a row of a codebook or of a table of positions
    would shrink in every step, and learn in few.
    """
    decaying = [group for group in groups if group.weight_decay]
    settings = [
        *(_adamw(group, _decayed(group), config, decay=True) for group in decaying),
        *(_adamw(group, _without(group.parameters, _decayed(group)), config) for group in decaying),
        *(_adamw(group, group.parameters, config) for group in groups if not group.weight_decay),
    ]
    return torch.optim.AdamW([chosen for chosen in settings if chosen["params"]], fused=True)


def _decayed(group: ParameterGroup) -> list[nn.Parameter]:
    return _without([p for p in group.parameters if p.ndim >= 2], group.undecayed)


def _without(parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    left_out = {id(other) for other in others}
    return [parameter for parameter in parameters if id(parameter) not in left_out]


def muon_matrices(objective: Objective) -> list[nn.Parameter]:
    """The parameters that Muon trains: the matrices and the convolutions' kernels in the objective's blocks."""
    inner = (p for block in objective.blocks() for p in block.parameters())
    matrices = {id(p) for p in inner if p.ndim >= 2 and p.requires_grad}
    return [parameter for parameter in objective.parameters() if id(parameter) in matrices]


def build_muon(objective: Objective, config: TrainingConfig, replicated: bool) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) on `muon_matrices`, AdamW without weight decay on embeddings, heads and vectors.

    DeepSpeed's implementation, which its ZeRO optimizers know: a matrix may be partitioned over processes. Where all
    are `replicated`, muon.py has the step. Muon's steps have a fixed size, so a clipped gradient norm would only
    shrink them all: clipping is AdamW's business.

    Raises:
        UserError: the objective has no blocks with matrices.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        spare_muons_compilation()
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    from pipeline.training.muon import ReplicatedMuon

    matrices = muon_matrices(objective)
    if not matrices:
        raise UserError(
            "optimizer muon needs a model with matrices in blocks, found none: set training.optimizer=adamw"
        )
    trained_by_muon = {id(matrix) for matrix in matrices}
    for parameter in objective.parameters():  # DeepSpeed's ZeRO optimizers read this attribute
        vars(parameter)["use_muon"] = id(parameter) in trained_by_muon
    muon_group: _Settings = {
        "params": matrices,
        "use_muon": True,
        "lr": config.muon_learning_rate,
        "initial_lr": config.muon_learning_rate,
        "momentum": 0.95,
        "weight_decay": config.weight_decay,
        # "standard" is in bf16; "gram" in fp16, which CPUs without bf16 have neither, and there in float32.
        "ns_method": "standard" if on_cpu and cpus_have_bf16() else "gram",
    }
    rest = [
        _adamw(group, [p for p in group.parameters if id(p) not in trained_by_muon], config)
        for group in objective.parameter_groups()
    ]
    optimizer: torch.optim.Optimizer = (ReplicatedMuon if replicated else MuonWithAuxAdam)(
        [muon_group, *(chosen | {"use_muon": False} for chosen in rest if chosen["params"])],
        adam_optimizer=torch.optim.AdamW,
        adam_optimizer_kwargs={"fused": True},
    )
    return optimizer


def spare_muons_compilation() -> None:
    """Run Muon's arithmetic as it is written: DeepSpeed compiles it, on a CPU with a C++ compiler in half a minute.

    Before anything imports its Muon: that alone loads torch's compiler, two seconds, whatever the optimizer is.
    """
    from deepspeed.runtime import compiler

    compile = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile


def _adamw(
    group: ParameterGroup, parameters: list[nn.Parameter], config: TrainingConfig, decay: bool = False
) -> _Settings:
    """AdamW's settings for some of a group's parameters."""
    scale = group.learning_rate_scale
    return {
        "params": parameters,
        "lr": config.learning_rate * scale,
        "initial_lr": config.learning_rate * scale,
        "betas": group.betas or config.betas,
        "eps": 1e-8,
        # AdamW decays by rate * decay, which is thereby the same for all scales.
        "weight_decay": config.weight_decay / scale if decay else 0.0,
    }
