"""Which of a model's tensors another model's weights give their first values to, told in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import distributed
from pipeline.core.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Fit:
    """How far another model's weights fit; a line for each thing that does not."""

    taken: int = 0  # tensors, whole or in part
    fresh: list[str] = field(default_factory=list)  # tensors that begin as without init_from, and why
    changed: list[str] = field(default_factory=list)  # those that fit after a change, or in part

    def tell(self, key: str, folder: Path) -> None:
        """Say it on rank 0.

        Args:
            key: of the config that names the model: transformer.init_from.

        Raises:
            UserError: nothing fits.
        """
        if not self.taken:
            raise UserError(
                f"{key}: expected a model to start from, found that none of this one's {len(self.fresh)} tensors"
                f" fits ({'; '.join(self.fresh[:2])}): give another one, or this one's layers, width and heads"
            )
        if not distributed.is_main():
            return
        for line in (*self.changed, *(f"{line}: begins fresh" for line in self.fresh)):
            log.info("%s: %s", key, line)
        log.info("%s: %d tensors start with the values of %s, %d fresh", key, self.taken, folder, len(self.fresh))
