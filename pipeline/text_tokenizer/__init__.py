"""The text tokenizer: byte-level BPE between captions and token ids. Imports no torch until it encodes."""

from pipeline.text_tokenizer.bpe import PAD_ID, TextTokenizer

__all__ = ["PAD_ID", "TextTokenizer"]
