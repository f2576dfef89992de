"""The page for those who hear it or have no mouse; and captions that would steer what shows them."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.report.plots import curve_plot, line_plot, standalone
from pipeline.report.shown_images import _generated, _reconstruction
from tests.data.sample_images import encoded, image


class Elements(HTMLParser):
    """Attributes of every element, by tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str]]] = {}
        self._open: list[dict[str, str]] = []
        self.around_tables: list[dict[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attributes}
        self.found.setdefault(tag, []).append(known)
        if tag == "table":
            self.around_tables.append(self._open[-1])
        if tag == "div":
            self._open.append(known)

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._open.pop()


def test_every_image_and_plot_of_the_page_has_a_name(tiny_run: Path) -> None:
    page = Elements((tiny_run / "report" / "index.html").read_text())
    assert page.found["img"]
    for one in page.found["img"]:
        assert one["alt"].partition(": ")[2].strip()
    assert page.found["svg"]
    names = [one["aria-label"] for one in page.found["svg"]]
    assert all(one["role"] == "img" for one in page.found["svg"])
    assert len(set(names)) == len(names)


def test_whatever_scrolls_is_reached_by_keyboard(tiny_run: Path) -> None:
    page = Elements((tiny_run / "report" / "index.html").read_text())
    scrolled = page.around_tables + page.found["pre"]
    assert len(scrolled) >= 4
    for one in scrolled:
        assert one["tabindex"] == "0"
        assert one["role"] == "region"
        assert one["aria-label"]


@pytest.mark.parametrize("name", ["transformer Loss", 'a "b" <c> & \\1'])
def test_the_name_of_a_plot_is_its_own(name: str) -> None:
    for svg in (
        line_plot([("loss", [0.0, 1.0], [2.0, 1.0])], salt=name),
        curve_plot([("", [0.0, 1.0], [2.0, 1.0])], [["a", "b"]], None, "x", "y", salt=name),
    ):
        found = ElementTree.fromstring(standalone(svg))
        assert found.get("aria-label") == f"plot: {name}"


def test_captions_that_steer_a_terminal_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(image(0)))
    steering = "red\x1b[2J\u202eevil"
    originals = {"a": encoded(image(1))}
    generated = _generated(
        {"prompt": steering, "kind": "new", "file": "a.png", "key": "a", "caption": steering, "distance": 1.0},
        tmp_path,
        originals,
    )
    reconstruction = _reconstruction(
        {"key": "a", "caption": steering, "split": "val", "file": "a.png", "psnr": 20.0}, tmp_path, originals
    )
    for text in (generated.prompt, generated.nearest_caption, reconstruction.caption):
        assert text == "red\\x1b[2J\\u202eevil"
