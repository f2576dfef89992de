"""Which image fits its prompt best: a small CLIP (`model.py`), or a pretrained one, behind `Ranker`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.reranker.ranker import Ranker as Ranker


def __getattr__(name: str) -> Any:
    # On first use: `config.py` is read by the command line, which must not load torch.
    if name == "Ranker":
        from pipeline.reranker.ranker import Ranker

        return Ranker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
