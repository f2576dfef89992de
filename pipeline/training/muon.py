"""Muon where every process has the whole model: on matrices, and on kernels of convolutions as matrices.

Jordan et al. 2024. The arithmetic, and AdamW for all other parameters, are DeepSpeed's. Its own step for parameters
that no ZeRO optimizer partitions knows neither kernels in channels-last memory nor a step that must change nothing.
To be imported after `optimizer.spare_muons_compilation`.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from deepspeed.runtime.zero.muon.original_muon import zeropower_via_gram_newtonschulz, zeropower_via_newtonschulz5
from torch import Tensor

WIDE = 6  # columns a row from which `gram_in_float32` is the quicker one on a CPU with bfloat16 arithmetic


def gram_in_float32(wide_BNM: Tensor, steps: int) -> Tensor:
    """What DeepSpeed's Newton-Schulz makes of matrices with many columns, [B,N,M], on CPUs in two thirds of the time.

    Over products of rows, N×N, as DeepSpeed's `gram`, which is made for float16 and has to begin anew after two steps.
    Here the polynomials in R = X·Xᵀ are gathered in Q, and one product Q·X is the result.
    """
    x_BNM = wide_BNM / (wide_BNM.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    r_BNN = x_BNM @ x_BNM.mT
    q_BNN: Tensor | None = None
    for step in range(steps):
        p_BNN = torch.baddbmm(r_BNN, r_BNN, r_BNN, beta=-4.7750, alpha=2.0315)  # Jordan's coefficients
        p_BNN.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        q_BNN = p_BNN if q_BNN is None else p_BNN @ q_BNN
        if step < steps - 1:
            r_BNN = p_BNN @ r_BNN @ p_BNN
    assert q_BNN is not None
    return q_BNN @ x_BNM


class ReplicatedMuon(MuonWithAuxAdam):
    """Muon on the groups with `use_muon`, AdamW on the others.

    A kernel [out,in,h,w] is taken as the matrix [out,h·w·in]. Those of one shape are orthogonalised together.

    Attributes:
        found_inf: a scalar on the device, 1 in a step that must change nothing (`optimizer.skip_unless`).
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if self.aux_optimizer is not None:
            adamw: Any = self.aux_optimizer
            adamw.found_inf = self.found_inf
            adamw.step()
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"] if group["use_muon"] else []:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for parameters in alike.values():
                self._move(parameters, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """A step of parameters of one shape."""
        applied = parameters[0].new_ones(()) if self.found_inf is None else 1 - self.found_inf
        updates = torch.stack([self._update(parameter, applied, group["momentum"]) for parameter in parameters])
        rows, columns = updates.shape[1:]
        if updates.device.type == "cpu" and columns >= WIDE * rows:
            orthogonalise = gram_in_float32
        elif group["ns_method"] == "gram":
            orthogonalise = zeropower_via_gram_newtonschulz
        else:
            orthogonalise = zeropower_via_newtonschulz5
        moves = orthogonalise(updates, steps=5).float() * (group["lr"] * max(1, rows / columns) ** 0.5 * applied)
        for parameter, move in zip(parameters, moves, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"] * applied)
            channels_last = parameter.movedim(1, -1)
            channels_last.sub_(move.view(channels_last.shape))

    def _update(self, parameter: Tensor, applied: Tensor, beta: float) -> Tensor:
        """The momentum after this step's gradient, and the gradient once more (Nesterov), as a matrix."""
        assert parameter.grad is not None
        state, gradient = self.state[parameter], torch.where(applied > 0, parameter.grad, 0.0)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, (1 - beta) * applied)
        return gradient.lerp_(momentum, beta).movedim(1, -1).flatten(1)
