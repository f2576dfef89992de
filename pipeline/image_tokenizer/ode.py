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
solver's steps. How near they come is what the solver's own settings say of the way back, too: `steps_per_block`, or for
dopri5 `tolerance`.

dopri5 (torchdiffeq's) chooses its steps for a batch as a whole: within the tolerance, an image's result depends on
those beside it. Where codes must not, take a solver with fixed steps. It looks at the error of each step, for which the
host waits for a GPU; the solvers with fixed steps are written here, in torchdiffeq's order of sums, because its own
ask the device about every point in time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchdiffeq import odeint

from pipeline.config.ode import OdeConfig

log = logging.getLogger(__name__)

_ADAPTIVE = "dopri5"
_THIRD = np.float32(1 / 3)

Time = np.float32 | Tensor  # a tensor where the solver chooses it
State = tuple[Tensor, ...]
Field = Callable[[Time, Tensor], Tensor]  # f(t, z)
Slopes = Callable[[Time, State], State]  # of each part of the state


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
        # The state stays in float32: under autocast, f alone computes in half precision.
        z = z_BCHW.float()
        f = self._field(z.device.type)
        if self.config.adjoint:
            out: Tensor = _Adjoint.apply(self, f, z, *self.branches.parameters())
        else:
            solution = self.solve(lambda t, state: (f(t, *state),), (z,))
            out = solution[0] if solution else z + float("nan") * f(np.float32(0), z)
        if z_BCHW.is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)
        return out

    def solve(self, slopes: Slopes, state: State, backwards: bool = False) -> State | None:
        """The state at t = N from that at 0, or the other way; None, and a warning, where dopri5 finds no solution."""
        if self.config.solver == _ADAPTIVE:
            return self._solve_adaptively(slopes, state, backwards)
        step = _STEPS[self.config.solver]
        per_block = self.config.steps_per_block
        times = np.arange(len(self.branches) * per_block + 1, dtype=np.float32) * np.float32(1 / per_block)
        times = times[::-1] if backwards else times
        for t, after in itertools.pairwise(times):
            state = step(slopes, t, after - t, state)
        return state

    def _solve_adaptively(self, slopes: Slopes, state: State, backwards: bool) -> State | None:
        config, blocks, device = self.config, len(self.branches), state[0].device
        times = torch.arange(0, blocks + 1, blocks, dtype=torch.float32, device=device)
        # Where the slope of θ(t) jumps, no step goes across: a solver of order 5 would reject many.
        inner = torch.arange(1, blocks, device=device, dtype=torch.float64)
        options = {"max_num_steps": config.max_steps} | ({"step_t": inner} if len(inner) else {})
        try:
            found: State = odeint(
                slopes,
                state,
                times.flip(0) if backwards else times,
                rtol=config.tolerance,
                atol=config.tolerance,
                method=_ADAPTIVE,
                options=options,
            )
        except AssertionError as error:  # torchdiffeq's way to say: too many steps, too small ones, or not finite
            self._warn(str(error))
            return None
        return tuple(values[-1] for values in found)

    def _warn(self, error: str) -> None:
        if not self._warned:
            log.warning(
                "dopri5 found no solution (%s): the step counts as not finite; raise ode.tolerance or"
                " ode.max_steps, lower the learning rate, or take a solver with fixed steps",
                error.partition("\n")[0][:80] or "no reason given",
            )
        self._warned = True

    def _field(self, device_type: str) -> Field:
        """f(t, z). The adjoint's backward pass evaluates it outside of the caller's autocast, so it brings its own."""
        enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)

        def f(t: Time, z: Tensor) -> Tensor:
            with torch.autocast(device_type, dtype, enabled=enabled):
                out: Tensor = functional_call(self.branches[0], self._weights(t), (z,))
                return self.gain * out.float()

        return f

    def _weights(self, t: Time) -> dict[str, Tensor]:
        """θ(t), as a sum over all blocks: every parameter then has a gradient, wherever a solver looks at f."""
        mixed: dict[str, Tensor] = {}
        for share, branch in zip(_shares(t, len(self.branches)), self.branches, strict=True):
            for name, weight in branch.named_parameters():
                mixed[name] = share * weight + mixed[name] if name in mixed else share * weight
        return mixed


class _Adjoint(torch.autograd.Function):
    """The solution at t = N, with gradients by the adjoint equation of its state, and of its weights on the way."""

    @staticmethod
    def forward(ctx: Any, stack: OdeStack, f: Field, z: Tensor, *weights: Tensor) -> Tensor:
        with torch.no_grad():
            solution = stack.solve(lambda t, state: (f(t, *state),), (z,))
        [out] = solution or (z * float("nan"),)
        ctx.stack, ctx.f = stack, f
        ctx.save_for_backward(out, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out, *weights = ctx.saved_tensors

        def slopes(t: Time, state: State) -> State:
            """Of z, of the loss's gradient at z, and of what the weights have of it so far."""
            z, at_z, *_ = state
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                slope = ctx.f(t, z)
                return slope.detach(), *torch.autograd.grad(slope, (z, *weights), -at_z)

        state = (out, gradient, *(torch.zeros_like(weight) for weight in weights))
        with torch.no_grad():
            solution = ctx.stack.solve(slopes, state, backwards=True)
        _, *gradients = solution or [float("nan") * values for values in state]
        return None, None, *gradients


def _shares(t: Time, blocks: int) -> Sequence[float | Tensor]:
    """How much of each block's weights θ(t) has: two neighbours' parts, which add up to 1."""
    if isinstance(t, Tensor):
        knots = torch.arange(blocks, device=t.device, dtype=t.dtype)
        return (1 - (t.clamp(max=blocks - 1) - knots).abs()).clamp(min=0).unbind()
    away = np.abs(np.minimum(t, np.float32(blocks - 1)) - np.arange(blocks, dtype=np.float32))
    shares: list[float] = np.maximum(1 - away, 0).tolist()
    return shares


def _euler(f: Slopes, t: np.float32, dt: np.float32, y: State) -> State:
    h = float(dt)
    return tuple(y + h * k for y, k in zip(y, f(t, y), strict=True))


def _midpoint(f: Slopes, t: np.float32, dt: np.float32, y: State) -> State:
    h, half = float(dt), np.float32(0.5) * dt
    middle = tuple(y + k * float(half) for y, k in zip(y, f(t, y), strict=True))
    return tuple(y + h * k for y, k in zip(y, f(t + half, middle), strict=True))


def _rk4(f: Slopes, t: np.float32, dt: np.float32, y: State) -> State:
    """The 3/8 rule (Kutta 1901)."""
    h, third = float(dt), 1 / 3
    k1 = f(t, y)
    k2 = f(t + dt * _THIRD, tuple(y + h * a * third for y, a in zip(y, k1, strict=True)))
    k3 = f(t + dt * (2 * _THIRD), tuple(y + h * (b - a * third) for y, a, b in zip(y, k1, k2, strict=True)))
    k4 = f(t + dt, tuple(y + h * (a - b + c) for y, a, b, c in zip(y, k1, k2, k3, strict=True)))
    return tuple(y + (a + 3 * (b + c) + d) * h * 0.125 for y, a, b, c, d in zip(y, k1, k2, k3, k4, strict=True))


_STEPS = {"euler": _euler, "midpoint": _midpoint, "rk4": _rk4}  # f, t, Δt and the state at t -> the state at t + Δt
