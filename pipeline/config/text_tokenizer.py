"""Config of the stage text-tokenizer. Knows neither tokenizers nor torch."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.base import Config, added


class TextTokenizerConfig(Config):
    """Section `text_tokenizer`: byte-level BPE over the captions of the training split."""

    vocab_size: int = Field(1024, ge=257, le=65_536, description="pad + 256 bytes + merges")
    text_length: int = Field(16, ge=1, le=1024, description="tokens per caption: longer ones are cut, shorter padded")
    lowercase: bool = Field(True, description="'Red Heart' and 'red heart' become the same tokens")
    max_captions: int = added(
        1_000_000,
        ge=1,
        description="of more captions, so many are drawn by the run's seed, and the rest is not read",
    )
