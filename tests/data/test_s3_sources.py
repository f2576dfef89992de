"""Sources on S3: a real server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.data.prepare import prepare
from tests.data.s3 import s3_server
from tests.data.sample_images import prepare_config, tree_bytes, write_folder
from tests.data.test_sources import first_part, samples_in, save_dataset, tar_config
from tests.launch import environment


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """An s3fs file system on a fresh S3 server with a bucket `images`, which the environment names."""
    with s3_server("images") as files:
        yield files


def _upload(bucket: Any, folder: Path, name: str) -> str:
    bucket.put(str(folder), f"images/{name}", recursive=True)
    return f"s3://images/{name}"


def test_a_folder_in_s3_gives_the_same_bytes_as_a_local_one(bucket: Any, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 7)
    write_folder(folder / "deeper", 3, start=50)
    url = _upload(bucket, folder, "folder")
    for name, path in (("local", str(folder)), ("remote", url)):
        config = prepare_config({"kind": "folder", "path": path}, shard_size=4, validation_fraction=0)
        prepare(tmp_path / name, config, seed=0)
    assert len(samples_in(tmp_path / "remote")) == 10
    assert tree_bytes(tmp_path / "local/train") == tree_bytes(tmp_path / "remote/train")


_PREPARE = """
import sys
from pathlib import Path
from pipeline.config.prepare import PrepareConfig
from pipeline.data.prepare import prepare
prepare(Path(sys.argv[2]), PrepareConfig.model_validate_json(sys.argv[1]), seed=0)
"""


@pytest.mark.slow
def test_tars_tables_and_data_sets_in_s3_becomesamples_in_in_worker_processes(bucket: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    tar_config(tmp_path, 5)
    _upload(bucket, tmp_path / "in", "tars")
    write_folder(tmp_path / "tables" / "images", 5)
    rows = [{"file": f"images/{n:05d}.png", "caption": f"number {n}"} for n in range(5)]
    (tmp_path / "tables/t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [row | {"image": (tmp_path / "tables" / row["file"]).read_bytes()} for row in rows]
    pq.write_table(pyarrow.Table.from_pylist(images), tmp_path / "tables/t.parquet", row_group_size=3)
    _upload(bucket, tmp_path / "tables", "tables")
    save_dataset(str(tmp_path / "saved"), 5)
    _upload(bucket, tmp_path / "saved", "saved")
    sources: list[dict[str, Any]] = [
        {"kind": "webdataset", "urls": "s3://images/tars/*.tar"},
        {"kind": "webdataset", "urls": "s3://images/tars/{0..0}.tar"},
        {"kind": "table", "path": "s3://images/tables/t.jsonl", "path_column": "file"},
        {"kind": "table", "path": "s3://images/tables/t.parquet", "bytes_column": "image"},
        {"kind": "huggingface", "path": "s3://images/saved", "split": "train"},
    ]
    for number, source in enumerate(sources):
        config = prepare_config(source, shard_size=3, validation_fraction=0, workers=2 if number == 2 else 1)
        # A process of its own: the server that this one forks workers from may be older than the S3 server's address.
        arguments = [config.model_dump_json(), str(tmp_path / f"out{number}")]
        subprocess.run([sys.executable, "-c", _PREPARE, *arguments], env=environment(), check=True)
        assert len(samples_in(tmp_path / f"out{number}")) == 5


def test_an_object_that_disappears_from_s3_halfway_stops_and_rejects_nothing(bucket: Any, tmp_path: Path) -> None:
    url = _upload(bucket, write_folder(tmp_path / "in", 3), "vanishing")
    source, part = first_part(prepare_config({"kind": "folder", "path": url}))
    records = source.records(part)
    next(records)
    bucket.rm("images/vanishing", recursive=True)
    with pytest.raises(UserError, match="it was listed a moment ago and is gone"):
        list(records)


def test_a_bucket_that_is_not_there_is_an_error(bucket: Any, tmp_path: Path) -> None:
    config = prepare_config({"kind": "webdataset", "urls": "s3://nowhere/{00000..00003}.tar"})
    with pytest.raises(UserError, match=r"expected tars at s3://nowhere/00000\.tar, found none"):
        prepare(tmp_path / "out", config, seed=0)
