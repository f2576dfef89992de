"""URLs with passwords: kept out of everything that is written, and put back where they are used.

mask("https://me:secret@host/x?token=abc")                 # "https://***@host/x?token=***", for messages
take_password_out("https://me:secret@host/x")              # "https://host/x"; this process remembers the rest
put_password_back("https://host/x")                        # "https://me:secret@host/x"

They are remembered in the environment variable SMALTI_CREDENTIALS, which child processes inherit: URLs with passwords,
apart by spaces. Set it yourself for a command that starts from a run's config.yaml.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CREDENTIALS_VARIABLE = "SMALTI_CREDENTIALS"

# A password may itself have an @ in it: up to the last one before the path.
_LOGIN = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<login>[^/\s'\"<>]*)@(?P<host>[^/?#\s'\"<>@{}]+)")
_SIGNED = re.compile(
    r"(?i)([?&](?:[\w-]*(?:token|signature|password|secret|credential)|sig|key|api_?key|access_?key)=)[^&\s'\"#,]+"
)


def mask(text: str) -> str:
    """The text with what is secret in its URLs as `***`: names with passwords, tokens and signatures."""
    return _SIGNED.sub(r"\1***", _LOGIN.sub(lambda m: f"{m['scheme']}***@{m['host']}", text))


def mask_all(value: object) -> object:
    """`mask` on every text of nested dicts and lists."""
    if isinstance(value, str):
        return mask(value)
    if isinstance(value, dict):
        return {key: mask_all(item) for key, item in value.items()}
    return [mask_all(item) for item in value] if isinstance(value, list | tuple) else value


def take_password_out(text: str) -> str:
    """The text without the names and passwords of its URLs, which this process and its children remember."""
    known = os.environ.get(CREDENTIALS_VARIABLE, "").split()
    for found in _LOGIN.finditer(text):
        if ":" in found["login"] and found.group() not in known:
            known.insert(0, found.group())
            os.environ[CREDENTIALS_VARIABLE] = " ".join(known)
    return without_password(text)


def put_password_back(url: str) -> str:
    """The URL with the name and password that are remembered for its scheme and host; itself if there are none."""
    for known in os.environ.get(CREDENTIALS_VARIABLE, "").split():
        if found := _LOGIN.match(known):
            bare = found["scheme"] + found["host"]
            if url == bare or (url.startswith(bare) and url[len(bare)] in "/?#"):
                return found.group() + url[len(bare) :]
    return url


def without_password(url: str) -> str:
    """The URL without a name and password."""
    return _LOGIN.sub(lambda m: m["scheme"] + m["host"] if ":" in m["login"] else m.group(), url)


def url_to_fs(url: str) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system of a URL and the path in it, with the password that is remembered."""
    from fsspec.core import url_to_fs as of_fsspec

    files, path = of_fsspec(put_password_back(url))
    return files, str(path)


class MaskingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without what is secret in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return mask(super().format(record))
