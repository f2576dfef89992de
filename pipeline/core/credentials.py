"""Passwords and signatures of URLs: kept out of what is written, and put back where they are used.

take_password_out("https://me:secret@host/x")              # "https://host/x"; this process remembers the rest
take_password_out("https://host/x?token=abc")              # "https://host/x?token=***"; likewise
put_password_back("https://host/x")                        # "https://me:secret@host/x"

They are remembered in the environment variable SMALTI_CREDENTIALS, which child processes inherit: whole URLs, apart by
spaces. Set it yourself for a command that starts from a run's config.yaml.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from pipeline.core.errors import UserError
from pipeline.core.urls import LOGIN, SIGNED, mask

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

CREDENTIALS_VARIABLE = "SMALTI_CREDENTIALS"

_HIDDEN = "=***"
_ROOT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]+")
_MOST_BYTES = 100_000  # Linux has 128 KiB for a variable


def take_password_out(text: str) -> str:
    """The text without the names, passwords and signatures of its URLs, which this process and its children remember.

    Raises:
        UserError: they are more than an environment variable holds.
    """
    known = os.environ.get(CREDENTIALS_VARIABLE, "").split()
    found = [match.group() for match in LOGIN.finditer(text) if ":" in match["login"]]
    if _signatures(text) and not set(text) & set(" \t\n"):
        found.append(text)
    if new := [url for url in found if url not in known]:
        known = [*reversed(new), *known]
        if sum(map(len, known)) > _MOST_BYTES:
            raise UserError(
                f"expected at most {_MOST_BYTES:,} bytes of URLs with passwords or signatures, found more: list them in"
                " a table (kind: table), which is not written down"
            )
        os.environ[CREDENTIALS_VARIABLE] = " ".join(known)
    return without_password(text)


def put_password_back(url: str) -> str:
    """The URL with the name, password and signature that are remembered for its scheme and host.

    Raises:
        UserError: a signature was taken out of it that is not remembered.
    """
    whole = url
    for known in os.environ.get(CREDENTIALS_VARIABLE, "").split():
        if (found := LOGIN.match(known)) and _is_at(url, found["scheme"] + found["host"]):
            whole = found.group() + url[len(found["scheme"] + found["host"]) :]
            break
    if _HIDDEN not in url:
        return whole
    signatures = _signatures_for(url)
    whole = SIGNED.sub(lambda m: m[1] + signatures.get(m[1][1:], m[2]), whole)
    if _HIDDEN in whole:
        raise UserError(
            f"{mask(url)} was written down without what is secret in it: start with the config file that has it, or set"
            f" {CREDENTIALS_VARIABLE} to the whole URL"
        )
    return whole


def without_password(url: str) -> str:
    """The URL without a name and password, and with *** for signatures."""
    bare = LOGIN.sub(lambda m: m["scheme"] + m["host"] if ":" in m["login"] else m.group(), url)
    return SIGNED.sub(r"\1***", bare)


def _signatures(url: str) -> dict[str, str]:
    """What is secret in the query of a URL, by the parameter with its `=`."""
    return {name[1:]: value for name, value in SIGNED.findall(url) if value != "***"}


def _signatures_for(url: str) -> dict[str, str]:
    """The remembered signatures of this very URL or, as of one with braces, of one of its scheme and host."""
    known = [text for text in os.environ.get(CREDENTIALS_VARIABLE, "").split() if _signatures(text)]
    bare = [without_password(text) for text in known]
    same = [text for text, of in zip(known, bare, strict=True) if of == url]
    near = [text for text, of in zip(known, bare, strict=True) if (root := _ROOT.match(of)) and _is_at(url, root[0])]
    return _signatures((same or near or [""])[0])


def _is_at(url: str, root: str) -> bool:
    """Whether the URL begins with this scheme and host, and not with one that is longer."""
    return url.startswith(root) and url[len(root) : len(root) + 1] in ("", "/", "?", "#")


def url_to_fs(url: str, **options: object) -> tuple[AbstractFileSystem, str]:
    """fsspec's file system of a URL and the path in it, with the password that is remembered; `options` of fsspec's."""
    from fsspec.core import url_to_fs as of_fsspec

    files, path = of_fsspec(put_password_back(url), **options)
    return files, str(path)
