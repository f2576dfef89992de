"""What a source gives as a caption -> clean text, or the reason why not."""

from __future__ import annotations

import math
from typing import Literal

from pipeline.config.prepare import FilterConfig
from pipeline.core.text import clean_text, decode_text
from pipeline.data.images import BadSample


def captions_of(value: object, wanted: Literal["first", "all", "random"]) -> list[object]:
    """The captions of an image that are wanted, at least one: text, bytes or numbers, not cleaned yet.

    Raises:
        BadSample: there is none.
    """
    captions = list(value) if isinstance(value, (list, tuple)) else [value]
    captions = [caption for caption in captions if caption is not None]
    if not captions:
        raise BadSample("missing caption")
    return captions[:1] if wanted == "first" else captions


def caption_text(value: object, filters: FilterConfig) -> str:
    """One caption as text, with single spaces and without what nobody sees.

    Raises:
        BadSample: it is no text, empty, or not of the wanted length.
    """
    text = clean_text(_text(value))
    if not text:
        raise BadSample("empty caption")
    shortest, longest = filters.min_caption_length, filters.max_caption_length
    if not shortest <= len(text) <= longest:
        raise BadSample("caption length", f"{len(text)} characters, expected {shortest} to {longest}")
    return text


def _text(value: object) -> str:
    try:
        if isinstance(value, bytes):
            return decode_text(value)
        if isinstance(value, str):
            return value.encode().decode()  # surrogates stand for bytes of a table that were not UTF-8
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return str(value)
    except (UnicodeError, ValueError, OverflowError) as error:
        raise BadSample("caption is not UTF-8", str(error)) from error
    raise BadSample("caption is not text", f"expected text, a number, or a list of these, found {type(value).__name__}")
