"""The contract between a model and the training loop: what is minimised, and what the loop must know of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their settings of the optimizer."""

    parameters: list[nn.Parameter]
    learning_rate_scale: float = 1.0  # times `training.learning_rate`; weight decay per step stays the same
    betas: tuple[float, float] | None = None  # AdamW's; None: `training.betas`
    weight_decay: bool = True  # `training.weight_decay` on matrices and kernels; False: none
    undecayed: Sequence[nn.Parameter] = ()  # some of `parameters`, not decayed either: codebooks, tables of positions
    adversary: bool = False  # learns against the rest: its gradient norm is clipped apart


@dataclass(frozen=True)
class Exported:
    """What of an objective's state becomes a model's folder (`core/pretrained.py`)."""

    prefix: str  # of its names in the objective, "transformer."
    config: dict[str, object]  # its config.json


class Objective(nn.Module, ABC):
    """A model and its loss. Its randomness is torch's global generator's, or a function of (seed, step, sample).

    One with plain parameters and no blocks need only define `forward`.
    """

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar) and metrics (detached scalars) of one micro-batch at 0-based optimizer step `step`."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every trainable parameter once, in the module's order within a group."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def blocks(self) -> list[nn.Module]:
        """Repeated layers in their order, which training compiles and recomputes, and Muon trains.

        Muon: their matrices and kernels. Each takes its activations as the first positional argument.
        """
        return []

    def attention_layers(self) -> list[nn.Module]:
        """The attention within `blocks`, which selective activation checkpointing recomputes; arguments as theirs."""
        return []

    def look_ahead(self, micro_batches: Sequence[dict[str, Tensor]], step: int) -> None:
        """Learn what a loss must know of the whole step. Called before a step of several micro-batches, on every rank.

        Without gradients, in the training's precision; it leaves no trace in the generator or in what learns.
        """
        return

    def averaged_buffers(self) -> dict[str, Tensor]:
        """Buffers that learn, by their full names: a moving average of the weights is one of them, too."""
        return {}

    def exported(self) -> Exported | None:
        """What a checkpoint of this training can be exported to; None: it cannot be."""
        return None

    def report(self, step: int) -> None:
        """Log what a user should know of the steps since the last call. Called on rank 0 with each line of metrics.

        Here waiting for the device costs nothing more.
        """
        return

    def after_update(self, applied: bool | Tensor) -> None:
        """Change what does not learn by gradients. Called once per optimizer update, on every rank.

        Args:
            applied: the update was finite and changed the weights; a tensor, so that nothing has to wait for it.
        """
        return
