"""Smalti: train an image tokenizer and a text+image transformer, and generate images from prompts."""

__version__ = "0.1.0"
