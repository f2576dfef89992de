"""Smalti: train an image tokenizer and a text+image transformer, and paint pictures from prompts."""

__version__ = "0.1.0"
