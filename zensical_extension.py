"""Formulas of the documentation site, as MathML.

An extension of Python-Markdown, named in zensical.toml. Formulas are written as GitHub shows them, `$…$` in a line and
```math blocks, and are converted while the site is built, so that a reader's browser needs no script and no network.
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor


class MathBlocks(Preprocessor):
    """```math blocks as display formulas."""

    def run(self, lines: list[str]) -> list[str]:
        text = re.sub(r"^```math\n(.*?)\n```$", self._formula, "\n".join(lines), flags=re.MULTILINE | re.DOTALL)
        return text.split("\n")

    def _formula(self, match: re.Match[str]) -> str:
        formula = f'<div style="overflow-x: auto" tabindex="0">{convert(match[1], display="block")}</div>'  # of a phone
        return f"\n\n{self.md.htmlStash.store(formula)}\n\n"


class MathInline(InlineProcessor):
    """`$…$` as a formula in the line."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Element | str, int, int]:  # noqa: N802
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class SiteExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.preprocessors.register(MathBlocks(md), "math-blocks", 28)  # after whitespace (30), before fenced code (25)
        md.inlinePatterns.register(MathInline(r"(?<![\\$\w])\$([^$\n]+)\$(?!\d)", md), "math", 187)  # code has 190


def makeExtension(**_: object) -> SiteExtension:  # noqa: N802
    """What Python-Markdown calls."""
    return SiteExtension()
