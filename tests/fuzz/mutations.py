"""Ways in which a file or a line goes wrong."""

from __future__ import annotations

from random import Random

_TOKENS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b"\n", b"\r\n", b"\r", b",", b"[", b"]", b"{", b"}", b"null",
    b"NaN", b"-1", b"1e999", b"99999999999999999999", b"\x1b[2J", b"../..", b"/dev/zero", b"\xf0\x9f\x98\x80",
    b"\xe2\x80\x8b", b"!!python/name:os.system", b"&a [*a]", b": ", b"- ", b"#", b"<html>", b"%PDF", b"GIF89a",
    b"\x89PNG\r\n\x1a\n",
)  # fmt: skip


def mutated(content: bytes, rng: Random) -> bytes:
    """The content with one to four changes, each of a kind that disks, networks, editors and scripts make."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice((_flip, _cut, _cut_out, _insert, _overwrite, _double, _zero, _swap, _empty))(content, rng)
    return content


def _at(content: bytes, rng: Random) -> int:
    # What decides how a file is read lies at its beginning, more often than not.
    return min(len(content), rng.randrange(64) if rng.random() < 0.3 else rng.randrange(len(content) + 1))


def _flip(content: bytes, rng: Random) -> bytes:
    at = min(_at(content, rng), max(len(content) - 1, 0))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :] if content else b""


def _cut(content: bytes, rng: Random) -> bytes:
    return content[: _at(content, rng)]


def _cut_out(content: bytes, rng: Random) -> bytes:
    at = _at(content, rng)
    return content[:at] + content[at + rng.choice((1, 7, 100, 512, 4_000)) :]


def _insert(content: bytes, rng: Random) -> bytes:
    at = _at(content, rng)
    return content[:at] + rng.choice(_TOKENS) * rng.choice((1, 1, 3, 600)) + content[at:]


def _overwrite(content: bytes, rng: Random) -> bytes:
    at, token = _at(content, rng), rng.choice(_TOKENS)
    return content[:at] + token + content[at + len(token) :]


def _double(content: bytes, rng: Random) -> bytes:
    at = _at(content, rng)
    return content[:at] + content[at : at + 700] + content[at:]


def _zero(content: bytes, rng: Random) -> bytes:
    at, length = _at(content, rng), rng.choice((1, 16, 512))
    return content[:at] + bytes(min(length, len(content) - at)) + content[at + length :]


def _swap(content: bytes, rng: Random) -> bytes:
    first, second = sorted((_at(content, rng), _at(content, rng)))
    return content[second:] + content[first:second] + content[:first]


def _empty(content: bytes, rng: Random) -> bytes:
    return b"" if rng.random() < 0.2 else content
