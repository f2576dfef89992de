"""How a model that was built without memory gets its parameters: in full, or at ZeRO-3 each process its slice of each.

At ZeRO-3 no process ever has more than one parameter in full. (Given a whole model, DeepSpeed would move all of it to
the device of each process, and partition it there.)
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.core import distributed
from pipeline.core.initial_values import InitialValues
from pipeline.core.objective import Objective
from pipeline.training.engines.zero_partitions import shard_of


def give_memory(objective: Objective, initial: InitialValues, drawn: bool) -> None:
    """Give each parameter all of its values, on the host; zeros unless `drawn`, for a checkpoint to replace them."""
    for parameter in objective.parameters():
        parameter.data = torch.zeros(parameter.shape)
    if drawn:
        for parameter, values in initial.draw(objective):
            parameter.data = values


def give_shards(
    objective: Objective, initial: InitialValues, drawn: bool, settings: dict[str, object], dtype: torch.dtype
) -> None:
    """Make the objective's parameters ZeRO-3's, in `dtype`, with their initial values; zeros unless `drawn`.

    Collective: DeepSpeed broadcasts each parameter, which it sees as zeros, before it takes this process's slice.
    """
    import deepspeed

    parameters = list(objective.parameters())  # in their order, which numbers them for DeepSpeed
    for index, parameter in enumerate(parameters):
        parameter.data = torch.zeros(parameter.shape, dtype=dtype)
        if index == 0:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings, dtype=dtype)
        else:
            vars(parameters[0])["convert_to_zero_parameters"](param_list=[parameter])
    if drawn:
        for parameter, values in initial.draw(objective):
            own = vars(parameter)["ds_tensor"]
            start, length = shard_of(values.numel(), own.numel())
            own[:length].copy_(values.view(-1)[start : start + length])
            del values
    objective.to(distributed.device())  # its buffers
