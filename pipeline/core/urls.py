"""What is secret in URLs, masked in everything that is shown or logged. `credentials.py` remembers it.

mask("https://me:secret@host/x?token=abc")                 # "https://***@host/x?token=***"
"""

from __future__ import annotations

import logging
import re

# A password may itself have an @ in it: up to the last one before the path.
LOGIN = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<login>[^/\s'\"<>]*)@(?P<host>[^/?#\s'\"<>@{}]+)")
SIGNED = re.compile(
    r"(?i)([?&](?:[\w-]*(?:token|signature|password|secret|credential)|sig|key|api_?key|access_?key)=)([^&\s'\"#,]+)"
)


def mask(text: str) -> str:
    """The text with what is secret in its URLs as `***`: names with passwords, tokens and signatures."""
    return SIGNED.sub(r"\1***", LOGIN.sub(lambda m: f"{m['scheme']}***@{m['host']}", text))


def mask_all(value: object) -> object:
    """`mask` on every text of nested dicts and lists."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: mask_all(item) for key, item in value.items()}
    return [mask_all(item) for item in value] if isinstance(value, list | tuple) else value


class MaskingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without what is secret in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return mask(super().format(record))
