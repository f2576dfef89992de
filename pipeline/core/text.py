"""Text from outside (captions, prompts, tables) made clean, and text that goes to a terminal made visible.

clean_text("\ufeff a  red\tcat\x00 ")      # "a red cat"
visible("\x1b[31mred")                     # "\\x1b[31mred": shown, not obeyed
"""

from __future__ import annotations

import re
import unicodedata

# Escape sequences of terminals: CSI (colours, cursor), OSC (titles, links), and the short ones.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
# Characters that show nothing and join nothing. The joiners U+200C and U+200D stay: scripts and emoji need them.
_UNSEEN = re.compile("[\ufeff\u200b\u2060\u00ad\u180e]")
_ALLOWED = "\n\t"


def clean_text(text: str) -> str:
    """The text without what nobody sees: single spaces, no controls, no escape sequences, no byte-order mark.

    "" if nothing that can be seen is left. Letters, marks and emoji are kept as they are.
    """
    text = _UNSEEN.sub("", _ESCAPES.sub("", text))
    text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    text = " ".join(text.split())
    return text if any(unicodedata.category(c) not in ("Cf", "Mn", "Me", "Zs") for c in text) else ""


def decode_text(content: bytes) -> str:
    """The text of a file, without its byte-order mark.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return content.decode("utf-8-sig")


def visible(text: str) -> str:
    """The text as it may go to a terminal: controls, invisible and direction-changing characters as escapes."""
    return "".join(c if c in _ALLOWED or _harmless(c) else _escaped(c) for c in text)


def one_line(text: object) -> str:
    """A message as one line of a terminal or log, whatever the values are that it quotes."""
    return visible(" ".join(str(text).split()))


def _harmless(character: str) -> bool:
    return character in "\u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
