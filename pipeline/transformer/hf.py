"""The transformer as a model of Hugging Face transformers, registered on import; no `trust_remote_code`.

    import pipeline.transformer.hf
    from transformers import AutoConfig, AutoModel
    model = AutoModel.from_pretrained("runs/openmoji/transformer/model")        # or transformer/ of an export
    text_logits, level_logits = model(text, codes)          # as `Transformer.forward`
    model.transformer                                       # the Transformer, for pipeline/sampling/

Without the first line AutoModel does not know the type; of an export its error says so (`EXPORTED_TYPE`).
`save_pretrained` writes what `load_transformer` (build.py) reads back.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.config.base import parse_config
from pipeline.config.transformer import TransformerShape
from pipeline.transformer.build import build_transformer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import EXPORTED_TYPE, MODEL_TYPE


class SmaltiConfig(PreTrainedConfig):
    """Layout and shape, as the transformer stage exports them in config.json."""

    model_type = MODEL_TYPE
    layout: dict[str, object] | None = None
    shape: dict[str, object] | None = None


class SmaltiModel(PreTrainedModel):
    """A `Transformer` inside; the exported weights carry no prefix, which `base_model_prefix` allows for."""

    config_class = SmaltiConfig
    base_model_prefix = "transformer"

    def __init__(self, config: SmaltiConfig) -> None:
        super().__init__(config)
        assert config.layout is not None
        assert config.shape is not None
        shape = parse_config(TransformerShape, config.shape, "config.json")
        self.transformer = build_transformer(Layout.from_dict(config.layout), shape)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `Transformer` has initialised its weights itself."""

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Text ids int64 [B, T] (0: pad) and codes int64 [B, N] of all levels -> logits of text and of each level."""
        logits: tuple[Tensor, list[Tensor]] = self.transformer(text, codes)
        return logits

    def save_pretrained(self, save_directory: str | Path, **_: object) -> None:  # type: ignore[override]
        self.transformer.save_pretrained(save_directory)


class SmaltiExportConfig(SmaltiConfig):
    """That of an export, whose type tells who reads it without this module what is missing."""

    model_type = EXPORTED_TYPE


class SmaltiExportModel(SmaltiModel):
    """The transformer of an export."""

    config_class = SmaltiExportConfig


AutoConfig.register(MODEL_TYPE, SmaltiConfig)
AutoModel.register(SmaltiConfig, SmaltiModel)
AutoConfig.register(EXPORTED_TYPE, SmaltiExportConfig)
AutoModel.register(SmaltiExportConfig, SmaltiExportModel)
