"""Promises of data in object stores: what is read is the same as on disk, through a store that fails now and then."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config.store import StoreConfig
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core import elsewhere
from pipeline.core.atomic_io import write_json
from pipeline.core.errors import UserError
from pipeline.core.manifest import first_fault
from pipeline.data import fetch_ahead, remote_file, tokens
from pipeline.data.catalog import Catalog
from pipeline.data.inspect import inspect_directory
from pipeline.data.pushed import push
from pipeline.data.remote_file import RemoteFile, configure
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import read_samples, read_shards
from pipeline.data.stream import ImageStream
from pipeline.data.token_parts import token_parts
from pipeline.data.tokenize_shards import join, tokenize_shards
from pipeline.evaluation.image_sets import prepared_images
from pipeline.orchestration.disk_usage import size_of_run
from pipeline.orchestration.graph import stage_named
from pipeline.orchestration.run_directory import RunDirectory
from tests.data.s3 import Proxy, proxy_to, s3_server
from tests.data.sample_images import tree_bytes
from tests.data.small_run import make_small_run, tokenize_job

BLOCK = 1 << 13  # so that a tar is a few


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_server("data") as files:
        yield files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to `tokenize`, both stages that can be pushed finished. Look, do not write."""
    run = make_small_run(tmp_path_factory.mktemp("run"), 120, TokenizeConfig(crops=2, batch_size=8))
    shutil.rmtree(run / "in")
    for name in ("prepare", "tokenize"):
        write_json(run / name / "identity.json", {"config": {}, "inputs": {}})
        outputs: dict[Path, str | None] = {run / name / output: None for output in ("index.json", "train", "val")}
        RunDirectory(run).finish(stage_named(name), outputs)
    return run


@pytest.fixture
def proxy(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Before the store; the environment names it."""
    with proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (remote_file, fetch_ahead, tokens):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)
    yield
    configure(StoreConfig.model_validate({}))


@pytest.fixture
def there(run: Path, proxy: Proxy, small_blocks: None, tmp_path: Path) -> Path:
    """The same run with its tars and token arrays in the store, none here, and with a cache of its own."""
    use(tmp_path / "cache")
    copy = Path(shutil.copytree(run, tmp_path / "there"))
    assert len(list(push(copy, f"s3://data/{tmp_path.name}", remove=True))) == 2
    assert not [*copy.rglob("*.tar"), *copy.rglob("*.tokens")]
    proxy.answered.clear()
    return copy


def use(cache: Path, **values: Any) -> None:
    """A process that begins anew with this cache."""
    configure(StoreConfig(cache=cache, **values))


def images(run: Path, count: int = 6, start: int = 0, **values: Any) -> list[bytes]:
    stream = ImageStream(run / "prepare", "train", seed=3, **values)
    return [batch["images"].numpy().tobytes() for batch in islice(stream.batches(start, 16), count)]


def token_rows(run: Path, count: int = 6, start: int = 0) -> list[bytes]:
    sampler = TokenSampler(run / "tokenize", "train", seed=3)
    return [
        b["text"].numpy().tobytes() + b["codes"].numpy().tobytes() for b in islice(sampler.batches(start, 16), count)
    ]


def ranges(proxy: Proxy) -> list[tuple[str, str]]:
    return [request for request in proxy.answered if request[1]]


def test_streams_from_the_store_are_those_from_the_disk_at_any_position(run: Path, there: Path) -> None:
    for start in (0, 80, 1_600):
        assert images(there, start=start) == images(run, start=start)
        assert images(there, start=start, cache_bytes=0) == images(run, start=start)
        assert token_rows(there, start=start) == token_rows(run, start=start)


def test_images_that_are_chosen_are_read_without_what_lies_around_them(run: Path, there: Path, proxy: Proxy) -> None:
    here, far = (prepared_images(Catalog(folder / "prepare", "train"), [3, 40]) for folder in (run, there))
    assert [image.content() for image in far] == [image.content() for image in here]
    wanted = [(image.slice.offset, image.slice.offset + len(image.content()) - 1) for image in here]
    assert [found for _, found in ranges(proxy)] == [f"bytes={begin}-{end}" for begin, end in wanted]


def test_what_lies_in_the_store_takes_no_room_here(run: Path, there: Path) -> None:
    sizes = [size_of_run(RunDirectory(folder))[0] for folder in (run, there)]
    gone = sum(path.stat().st_size for pattern in ("*.tar", "*.tokens") for path in run.rglob(pattern))
    assert sizes[0] - sizes[1] == pytest.approx(gone, rel=0.05)


def test_some_files_may_be_here_and_some_there(run: Path, there: Path) -> None:
    here = [name for n in (0, 6, 7) for name in (f"prepare/train/{n:06d}.tar", f"tokenize/train/{n:03d}.tokens")]
    for name in here:
        shutil.copy(run / name, there / name)
    assert images(there) == images(run)
    assert token_rows(there) == token_rows(run)
    for name in ("prepare", "tokenize"):
        manifest = RunDirectory(there).manifest(name)
        assert manifest is not None
        assert first_fault(there / name, manifest["outputs"], hashed=False) is None


@pytest.mark.slow
def test_all_else_that_reads_data_reads_it_from_the_store(run: Path, there: Path) -> None:
    assert list(read_samples(there / "prepare", "train")) == list(read_samples(run / "prepare", "train"))
    here, far = (Catalog(folder / "prepare", "val") for folder in (run, there))
    assert [s.encoded for s in far.samples(range(3))] == [s.encoded for s in here.samples(range(3))]
    told = "\n".join(inspect_directory(there, None, verify=True))
    assert "every shard is, byte for byte" in told
    assert "every array is what its checksum says" in told
    job = tokenize_job(there, there / "again", TokenizeConfig(crops=2, batch_size=8))
    list(tokenize_shards(job, token_parts(job.prepare_dir)))
    join(job)
    assert tree_bytes(there / "again/train") == tree_bytes(run / "tokenize/train")


@pytest.mark.slow
def test_each_block_is_fetched_once_and_after_a_restart_none(there: Path, proxy: Proxy) -> None:
    images(there, 20)
    token_rows(there, 20)
    fetched = ranges(proxy)
    assert len(set(fetched)) == len(fetched) > 20
    use(remote_file._config.cache or Path())
    images(there, 20)
    token_rows(there, 20)
    assert ranges(proxy) == fetched


def test_a_stage_whose_files_lie_in_the_store_is_up_to_date_and_one_that_lost_others_is_not(there: Path) -> None:
    for name in ("prepare", "tokenize"):
        manifest = RunDirectory(there).manifest(name)
        assert manifest is not None
        assert first_fault(there / name, manifest["outputs"], hashed=False) is None
    next((there / "prepare/train").glob("*.index.npy")).unlink()
    manifest = RunDirectory(there).manifest("prepare")
    assert manifest is not None
    assert first_fault(there / "prepare", manifest["outputs"], hashed=False) is not None


@pytest.mark.slow
def test_a_push_that_was_interrupted_sends_what_is_missing_and_refuses_what_is_damaged(
    run: Path, proxy: Proxy, bucket: Any, tmp_path: Path
) -> None:
    use(tmp_path / "cache")
    copy, url = Path(shutil.copytree(run, tmp_path / "copy")), f"s3://data/{tmp_path.name}"
    tar = read_shards(copy / "prepare", "train")[2]
    content = bytearray((copy / "prepare" / tar.name).read_bytes())
    content[700] ^= 1
    (copy / "prepare" / tar.name).write_bytes(content)
    with pytest.raises(UserError, match=r"000002\.tar is damaged: expected sha256"):
        list(push(copy, url, remove=True))
    assert (copy / "prepare/train/000000.tar").exists()
    assert elsewhere.read(copy / "prepare") is None
    content[700] ^= 1
    (copy / "prepare" / tar.name).write_bytes(content)
    proxy.answered.clear()
    told = list(push(copy, url, remove=True))
    sent = [
        path for path, _ in proxy.answered if "000000." in path and "prepare/train" in path and "list-type" not in path
    ]
    assert "0 local ones" not in told[0]
    assert len(sent) <= 1  # asked for, perhaps; not sent again
    assert images(copy, 2) == images(run, 2)


@pytest.mark.slow
def test_one_flipped_byte_in_the_cache_is_fetched_again(
    run: Path, there: Path, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    images(there, 20)
    token_rows(there, 20)
    fetched = len(ranges(proxy))
    cache = remote_file._config.cache
    assert cache is not None
    blocks = [path for path in cache.rglob("0*") if path.is_file()]
    for path in blocks:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    use(cache)
    with caplog.at_level(logging.WARNING):
        assert images(there, 20) == images(run, 20)
        assert token_rows(there, 20) == token_rows(run, 20)
    assert "is damaged: that block is fetched again" in caplog.text
    assert len(ranges(proxy)) > fetched


def test_one_flipped_byte_in_the_store_is_told_with_its_object(there: Path, bucket: Any) -> None:
    for name in ("prepare/train/000000", "tokenize/train/000"):
        (path,) = bucket.glob(f"data/{there.parent.name}/{name}.*")
        content = bytearray(bucket.cat_file(path))
        content[len(content) // 3] ^= 1
        bucket.pipe_file(path, bytes(content))
    with pytest.raises(UserError, match=r"000000\.[0-9a-f]+\.tar is not the shard that prepare wrote: expected sha256"):
        list(inspect_directory(there / "prepare", None, verify=True))
    sampler = TokenSampler(there / "tokenize", "train", seed=3)
    with pytest.raises(UserError, match=r"000\.[0-9a-f]+\.tokens is damaged between bytes 0 and"):
        sampler.verify()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["away", "busy"])
def test_a_store_that_fails_for_a_while_is_waited_for(
    mode: str, run: Path, there: Path, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.mode = mode
    threading.Timer(2.0, lambda: setattr(proxy, "mode", "on")).start()
    with caplog.at_level(logging.INFO):
        assert images(there) == images(run)
    assert proxy.refused > 1
    lines = [line for line in caplog.messages if "s3://data" in line]
    assert len(lines) == 2, lines
    assert "waiting for up to 120 s" in lines[0]
    assert "answers again, after" in lines[1]


@pytest.mark.slow
def test_a_store_that_stays_away_is_one_line_after_the_patience(there: Path, proxy: Proxy, tmp_path: Path) -> None:
    use(tmp_path / "other", patience_s=1.5)
    proxy.mode = "away"
    started = time.monotonic()
    with pytest.raises(UserError) as told:
        images(there)
    assert 1.5 <= time.monotonic() - started < 30
    assert str(told.value).startswith("s3://data/")
    assert "expected an answer of the store within store.patience_s=1.5, found:" in str(told.value)
    assert str(told.value).endswith("see that it is there, and run the same command again")


def test_an_object_that_is_gone_is_told_at_once(there: Path, bucket: Any) -> None:
    bucket.rm(f"data/{there.parent.name}/prepare", recursive=True)
    with pytest.raises(UserError, match=r"expected an object at s3://data/.*\.tar, found none"):
        images(there)


@pytest.mark.slow
def test_credentials_that_expire_in_the_middle_are_looked_up_anew_until_they_are_renewed(
    run: Path, small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, copy = tmp_path / "credentials", Path(shutil.copytree(run, tmp_path / "there"))
    expired = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"
    keys.write_text(expired)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    with s3_server("own"):
        use(tmp_path / "one")
        list(push(copy, "s3://own", remove=True))
        begin_to_ask, renewed = renewable_key()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        use(tmp_path / "two")
        batches = ImageStream(copy / "prepare", "train", seed=3, cache_bytes=0).batches(0, 16)
        found = [next(batches)["images"].numpy().tobytes()]
        begin_to_ask()
        use(tmp_path / "three")  # with nothing in it: all is read by the keys that are looked up from now on
        threading.Timer(1.5, lambda: keys.write_text(renewed)).start()
        found += [batch["images"].numpy().tobytes() for batch in islice(batches, 7)]
        batches.close()
        keys.write_text(expired)
        use(tmp_path / "four", patience_s=1.0)
        with pytest.raises(UserError, match="PermissionError: .*: renew the credentials, and run the same command"):
            images(copy)
    assert found == images(run, 8)


def test_without_credentials_the_line_names_them(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    use(tmp_path / "other", patience_s=0.5)
    with pytest.raises(UserError, match="NoCredentialsError: .*: renew the credentials, and run the same command"):
        images(there)


def renewable_key() -> tuple[Callable[[], None], str]:
    """A function from which on the server takes one key alone, and the credentials file that has it."""
    import boto3

    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    allowed = {"Version": "2012-10-17", "Statement": {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}}
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=json.dumps(allowed))

    def ask() -> None:
        url = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(url, b"0", {"Content-Type": "text/plain"})).close()

    secret = f"aws_access_key_id = {key['AccessKeyId']}\naws_secret_access_key = {key['SecretAccessKey']}\n"
    return ask, f"[default]\n{secret}"


@pytest.mark.slow
def test_a_full_cache_disk_is_no_end(
    run: Path, there: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = remote_file._store().cache
    monkeypatch.setattr("pipeline.data.block_cache._write", _no_space)
    with caplog.at_level(logging.WARNING):
        assert images(there, cache_bytes=0) == images(run)
        assert token_rows(there) == token_rows(run)
    assert caplog.text.count("no space left for the cache of object stores") == 1
    assert cache.is_full


def _no_space(descriptor: int, content: bytes) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_the_cache_stays_within_its_bound_and_reads_stay_right(run: Path, there: Path, tmp_path: Path) -> None:
    use(tmp_path / "small", cache_gigabytes=0.05)
    store = remote_file._store()
    store.cache.most_bytes = 8 * BLOCK
    assert images(there, 20, cache_bytes=0) == images(run, 20)
    assert token_rows(there, 20) == token_rows(run, 20)
    held = sum(path.stat().st_size for path in (tmp_path / "small").rglob("0*") if path.is_file())
    assert held <= (8 + store.config.connections) * (BLOCK + 4)


def test_a_cache_that_is_smaller_than_what_is_read_at_once_is_told(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images(there, 1)
    token_rows(there, 1)
    assert "raise it" not in caplog.text
    monkeypatch.setattr(fetch_ahead, "cache_bytes", lambda: 10_000)
    images(there, 1)
    token_rows(there, 1)
    told = [line for line in caplog.messages if line.startswith("store.cache_gigabytes=1e-05: 0.0 GB are read at once")]
    assert len(told) == 2


def test_ranges_across_blocks_are_whole(there: Path, bucket: Any) -> None:
    (path,) = bucket.glob(f"data/{there.parent.name}/prepare/train/000000.*")
    content = bucket.cat_file(path)
    file = RemoteFile(f"s3://{path}", len(content), "0" * 64)
    generator = np.random.default_rng(0)
    for begin, end in np.sort(generator.integers(0, len(content), (50, 2)), axis=1).tolist():
        assert file[begin:end] == content[begin:end]
    assert file[0 : len(content)] == content
