"""The shards of a part of the source while they are made: each image is on the disk before the next one is decoded.

with part_files(directory, "000000") as files:
    files.add("train", sample)         # into a temporary tar
files.shards, files.indexes            # what was written; the tars have their names now
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.core.atomic_io import sha256_file
from pipeline.data.places import PlaceWriter, UsersTar, open_places
from pipeline.data.shard_table import ShardEntry
from pipeline.data.shards import Sample, ShardWriter, index_path, open_shard
from pipeline.data.splits import SPLITS


class PartFiles:
    """At most one shard of each split."""

    def __init__(self, directory: Path, stem: str, stack: ExitStack, tar: UsersTar | None) -> None:
        self.kept: dict[str, list[Sample]] = {split: [] for split in SPLITS}  # without their images
        self._directory, self._stem, self._stack, self._tar = directory, stem, stack, tar
        self._writers: dict[str, ShardWriter | PlaceWriter] = {}

    def add(self, split: str, sample: Sample) -> None:
        """Write a sample."""
        if split not in self._writers:
            path = self._directory / self._name(split)
            if self._tar is None:
                self._writers[split] = self._stack.enter_context(open_shard(path))
            else:
                self._writers[split] = self._stack.enter_context(open_places(path, self._tar))
        self._writers[split].add(sample)
        self.kept[split].append(replace(sample, encoded=b""))

    @property
    def shards(self) -> dict[str, ShardEntry]:
        """The entry of the shard of each split that has one."""
        entries: dict[str, ShardEntry] = {}
        for split in self._made():
            writer, samples = self._writers[split], self.kept[split]
            entries[split] = {
                "name": self._name(split),
                "samples": len(samples),
                "bytes": writer.bytes,
                "sha256": writer.sha256,
            }
            if isinstance(writer, PlaceWriter):
                entries[split] |= {"tar": writer.tar.url, "tar_bytes": writer.tar.bytes}
            captions = sum(len(sample.captions) for sample in samples)
            if captions != len(samples):
                entries[split]["captions"] = captions
        return entries

    @property
    def indexes(self) -> dict[str, str]:
        """The SHA-256 of the index beside each shard, by split."""
        return {split: sha256_file(index_path(self._directory / self._name(split))) for split in self._made()}

    def _made(self) -> list[str]:
        return [split for split in SPLITS if split in self._writers]

    def _name(self, split: str) -> str:
        return f"{split}/{self._stem}.tar"


@contextmanager
def part_files(directory: Path, stem: str, tar: UsersTar | None = None) -> Iterator[PartFiles]:
    """The files of part `stem`, which get their names when the block ends without error.

    `tar`: the user's, in which the images stay; None: they are written.
    """
    with ExitStack() as stack:
        files = PartFiles(directory, stem, stack, tar)
        yield files
