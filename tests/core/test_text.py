"""Text from outside: what nobody sees is taken out, and nothing of it commands a terminal."""

from __future__ import annotations

import pytest

from pipeline.core.text import clean_text, decode_text, visible


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("  a  red\n cat ", "a red cat"),
        ("\ufeffa red cat", "a red cat"),
        ("a red\x00 cat", "a red cat"),
        ("a\x00cat", "a cat"),
        ("a \x1b[31mred\x1b[0m cat\x07", "a red cat"),
        ("\x1b]0;title\x07a red cat", "a red cat"),
        ("\u200b\u200d\u2060\ufeff", ""),
        ("\x00\x1b\x7f\x85", ""),
        ("\u202e\u200f", ""),
        ("a re\u200bd cat", "a red cat"),
        ("👩\u200d🚀 ❤\ufe0f", "👩\u200d🚀 ❤\ufe0f"),  # joined emoji stay
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("Bär, cafe\u0301", "Bär, cafe\u0301"),
    ],
)
def test_text_from_outside_keeps_what_can_be_seen_and_nothing_else(found: str, expected: str) -> None:
    assert clean_text(found) == expected
    assert clean_text(clean_text(found)) == expected


def test_text_that_is_printed_commands_no_terminal() -> None:
    shown = visible("a \x1b[31mred\x00 \u202ecat\u2028 \ud800 Bär 👩\u200d🚀\n\U000e0041")
    assert shown == "a \\x1b[31mred\\x00 \\u202ecat\\u2028 \\ud800 Bär 👩\u200d🚀\n\\U000e0041"
    shown.encode()


def test_a_file_with_a_byte_order_mark_is_text() -> None:
    assert decode_text(b"\xef\xbb\xbfa cat") == "a cat"
    with pytest.raises(UnicodeDecodeError):
        decode_text("ein Bär".encode("latin-1"))
