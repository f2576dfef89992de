"""Config of continuous-depth blocks (`ode.py`). Knows no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Config


class OdeConfig(Config):
    """Section `ode`: how `block: ode` solves dz/dt = f(z, t) (Chen et al. 2018); see ode.py."""

    solver: Literal["euler", "midpoint", "rk4", "dopri5"] = Field(
        "rk4", description="dopri5 chooses its own steps, the others take fixed ones"
    )
    steps_per_block: int = Field(1, ge=1, le=1_000, description="fixed steps instead of each residual block")
    tolerance: float = Field(
        1e-3,
        gt=0,
        description="dopri5: error that a step may make, relative and absolute, in the adjoint's way back too",
    )
    max_steps: int = Field(100, ge=1, description="dopri5: steps per pass; more count as a step that is not finite")
    adjoint: bool = Field(False, description="gradients by the adjoint equation: no activations kept, twice the work")
