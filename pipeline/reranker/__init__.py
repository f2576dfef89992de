"""Rerankers, which score images by their prompts: a small CLIP (`model.py`) or a pretrained one, both as `Ranker`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.reranker.ranker import Ranker as Ranker


def __getattr__(name: str) -> type[Ranker]:
    # On first use: whoever imports the package need not load torch.
    if name == "Ranker":
        from pipeline.reranker.ranker import Ranker

        return Ranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
