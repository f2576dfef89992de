"""The model of a shape, of whichever order; and that of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config.base import parse_config
from pipeline.config.transformer import TransformerShape
from pipeline.core.pretrained import load_model
from pipeline.transformer.any_order import AnyOrderTransformer
from pipeline.transformer.bit_groups import GroupedTransformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from pipeline.transformer.next_scale import NextScaleTransformer

_MODELS: dict[str, type[Transformer]] = {
    model.order: model for model in (Transformer, AnyOrderTransformer, NextScaleTransformer)
}


def build_transformer(layout: Layout, shape: TransformerShape) -> Transformer:
    """The transformer that `shape.order` names."""
    if shape.code_groups > 1:
        return GroupedTransformer(layout, shape)
    return _MODELS[shape.order](layout, shape)


def load_transformer(
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """As `Transformer.from_pretrained`, of any order.

    Raises:
        UserError: files are missing or do not fit together.
    """

    def build(config: dict[str, Any], where: str) -> Transformer:
        shape = parse_config(TransformerShape, config["shape"], where)
        return build_transformer(Layout.from_dict(config["layout"]), shape)

    return load_model(directory, "transformer", ("layout", "shape"), build, dtype, device)
