"""Continuous depth (Chen et al. 2018, "Neural Ordinary Differential Equations"): a residual stack as dz/dt = f(z, t).

A stack of N residual blocks, z ← z + g · branch_i(z), is Euler's method with step 1 on

    dz/dt = f(z, t) = g · branch(z; θ(t)),   0 ≤ t ≤ N,

where θ(t) runs linearly from each block's weights to the next one's: θ(i) = θ_i, and θ(t) = θ_{N−1} behind the last
(weights as a piecewise linear function of depth: Queiruga et al. 2020, "Continuous-in-Depth Neural Networks"). So
there are as many parameters as in the stack, and `solver: euler, steps_per_block: 1` is the stack to the last bit;
finer steps and other solvers go between the blocks. With N = 1, f does not depend on t.

    solver     evaluations of f a step and block      order
    euler      1                                      1
    midpoint   2                                      2
    rk4        4                                      4       (the 3/8 rule)
    dopri5     as `tolerance` asks for, at least 7    5       Dormand & Prince 1980; steps end at each block

`adjoint: true` keeps no activations: it solves the adjoint equation backwards in time (Chen et al. 2018, section 2),
with twice the work and with gradients that are those of the exact solution, so they differ from those of a coarse
solver's steps. dopri5 chooses its steps for a batch as a whole: within the tolerance, an image's result depends on
those beside it. Where codes must not, take a solver with fixed steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchdiffeq import odeint, odeint_adjoint

from pipeline.config.ode import OdeConfig

log = logging.getLogger(__name__)

_ADAPTIVE = "dopri5"


class OdeStack(nn.Module):
    """[B,C,H,W] -> [B,C,H,W], float32: the state z at t = N, from z at t = 0."""

    def __init__(self, branches: Sequence[nn.Module], gain: float, config: OdeConfig) -> None:
        """`branches`: what each of the N ≥ 1 residual blocks adds to its input, before the factor `gain`; all alike."""
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.gain = gain
        self.config = config
        self._warned = False

    def forward(self, z_BCHW: Tensor) -> Tensor:
        blocks = len(self.branches)
        # The state stays in float32: under autocast, f alone computes in half precision.
        z = z_BCHW.float()
        t = torch.tensor([0.0, float(blocks)], device=z.device)
        f = self._field(z.device.type)
        out = self._adaptive(f, z, t) if self.config.solver == _ADAPTIVE else self._solve(f, z, t)
        if z_BCHW.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    def _field(self, device_type: str) -> Callable[[Tensor, Tensor], Tensor]:
        """f(t, z). The adjoint's backward pass evaluates it outside of the caller's autocast, so it brings its own."""
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

        def f(t: Tensor, z: Tensor) -> Tensor:
            with torch.autocast(device_type, dtype, enabled=enabled):
                out: Tensor = functional_call(self.branches[0], self._weights(t), (z,))
                return self.gain * out.float()

        return f

    def _weights(self, t: Tensor) -> dict[str, Tensor]:
        """θ(t), as a sum over all blocks: every parameter then has a gradient, wherever a solver looks at f."""
        blocks = len(self.branches)
        knots = torch.arange(blocks, device=t.device, dtype=t.dtype)
        shares = (1 - (t.clamp(max=blocks - 1) - knots).abs()).clamp(min=0).unbind()
        mixed: dict[str, Tensor] = {}
        for share, branch in zip(shares, self.branches, strict=True):
            for name, weight in branch.named_parameters():
                mixed[name] = share * weight + mixed[name] if name in mixed else share * weight
        return mixed

    def _solve(self, f: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
        config = self.config
        step = {"step_size": 1 / config.steps_per_block}
        options: dict[str, object] = dict(step)
        if config.solver == _ADAPTIVE:
            # Where the slope of θ(t) jumps, no step goes across: a solver of order 5 would reject many.
            inner = torch.arange(1, len(self.branches), device=z.device, dtype=torch.float64)
            options = {"max_num_steps": config.max_steps} | ({"step_t": inner} if len(inner) else {})
        tolerances = {"rtol": config.tolerance, "atol": config.tolerance}
        if not config.adjoint:
            return odeint(f, z, t, method=config.solver, options=options, **tolerances)[-1]
        # Backwards with fixed steps after dopri5 too: an adaptive solver would raise on a gradient that is not finite,
        # which the training loop skips and counts.
        backwards = "rk4" if config.solver == _ADAPTIVE else config.solver
        solution: Tensor = odeint_adjoint(
            f,
            z,
            t,
            method=config.solver,
            options=options,
            adjoint_method=backwards,
            adjoint_options=dict(step),
            adjoint_params=tuple(self.branches.parameters()),
            **tolerances,
        )
        return solution[-1]

    def _adaptive(self, f: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
        try:
            return self._solve(f, z, t)
        except AssertionError as error:  # torchdiffeq's way to say: too many steps, too small ones, or not finite
            if not self._warned:
                reason = str(error).splitlines()[0][:80] or "no reason given"
                log.warning(
                    "dopri5 found no solution (%s): the step counts as not finite; raise ode.tolerance or"
                    " ode.max_steps, lower the learning rate, or take a solver with fixed steps",
                    reason,
                )
                self._warned = True
            return z + float("nan") * f(t[0], z)
