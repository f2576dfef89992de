"""Several sources: exact shares in every 1,000 samples, whatever ranks, restarts and changed weights."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pipeline.config.base import identity, parse_config
from pipeline.config.pipeline import PipelineConfig
from pipeline.config.prepare import PrepareConfig, shares_of
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.data.inspect import inspect_directory
from pipeline.data.mixture import Mixture, epoch_metrics, shard_order, token_order
from pipeline.data.order import GlobalOrder
from pipeline.data.prepare import prepare
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import read_index, read_samples
from pipeline.data.source_stamp import stamp_of_all
from pipeline.data.stream import ImageStream
from pipeline.orchestration import outside
from tests.data.sample_images import image, tree_bytes, write_folder
from tests.data.small_run import make_small_run

SHARES = [(0, (700, 300))]
CHANGED = [(0, (700, 300)), (1_536, (200, 800))]


def _config(*sources: dict[str, Any], **values: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"sources": list(sources), "image_size": 16, "workers": 1, **values})


def _folder(path: Path, count: int, start: int = 0, **values: Any) -> dict[str, Any]:
    return {"kind": "folder", "path": str(write_folder(path, count, start)), **values}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to tokenize, of two folders whose files have the same names, in several shards each."""
    directory = tmp_path_factory.mktemp("mixture")
    a, b = _folder(directory / "a", 50, weight=0.7), _folder(directory / "b", 30, start=50, weight=0.3)
    for number in range(50, 80):  # the names of the first folder's
        for suffix in (".png", ".txt"):
            (directory / "b" / f"{number:05d}{suffix}").rename(directory / "b" / f"{number - 50:05d}{suffix}")
    config = _config(a, b, shard_size=16, validation_fraction=0.1)
    return make_small_run(directory, 0, TokenizeConfig(batch_size=8, crops=1), prepare_config=config)


def _sources_at(order: Mixture, begin: int, end: int) -> list[int]:
    return order.sources(np.arange(begin, end))[0].tolist()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1, 1), (0.001, 0.999), (5, 3, 2, 0.05), (1,) * 7])
def test_every_window_of_1000_samples_has_exactly_the_shares(weights: tuple[float, ...]) -> None:
    shares = shares_of(weights)
    assert all(abs(share - 1_000 * weight / sum(weights)) < 1 for share, weight in zip(shares, weights, strict=True))
    order = Mixture([GlobalOrder(37, seed) for seed in range(len(weights))], [(0, shares)])
    sources = np.array(_sources_at(order, 0, 3_500))
    for source, share in enumerate(shares):
        ahead = np.cumsum(sources == source)
        assert set((ahead[1_000:] - ahead[:-1_000]).tolist()) == {share}
        # Evenly inside of them, too: nowhere more than a sample or two away from its share.
        assert np.abs(ahead - np.arange(1, 3_501) * share / 1_000).max() < 2


def test_each_source_is_shuffled_by_itself_and_each_of_its_samples_comes_once_an_epoch_of_it() -> None:
    order = shard_order([20, 10, 5, 9, 7], [35, 16], seed=4, shares=SHARES)
    samples, epochs = order.locate(np.arange(5_000))
    for begin, end in ((0, 35), (35, 51)):
        mine = (samples >= begin) & (samples < end)
        for epoch in range(int(epochs[mine].max())):
            assert Counter(samples[mine & (epochs == epoch)].tolist()) == Counter(range(begin, end))
        assert samples[mine & (epochs == 0)].tolist() != samples[mine & (epochs == 1)].tolist()


def test_another_weight_in_the_middle_goes_on_where_each_source_was() -> None:
    before, after = (token_order(80, [50, 30], 0, shares) for shares in (SHARES, CHANGED))
    positions = np.arange(6_000)
    samples, changed = before.locate(positions)[0], after.locate(positions)[0]
    assert samples[:1_536].tolist() == changed[:1_536].tolist()
    for is_first in (True, False):
        mine, theirs = samples[(samples < 50) == is_first], changed[(changed < 50) == is_first]
        length = min(len(mine), len(theirs))
        assert mine[:length].tolist() == theirs[:length].tolist()
    assert isinstance(after, Mixture)
    assert Counter(_sources_at(after, 3_000, 4_000)) == {0: 200, 1: 800}
    assert after.epochs(1_536) == [count / size for count, size in zip((1_075, 461), (50, 30), strict=True)]
    assert epoch_metrics(after, ["a", "b"], 2_536) == {"epochs/a": 1_275 / 50, "epochs/b": 1_261 / 30}
    assert epoch_metrics(GlobalOrder(5, 0), ["a"], 9) == {}


@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_ranks_and_restarts_anywhere_keep_order_and_shares(run: Path, kind: str) -> None:
    """2, then 1, then 4 processes, and another weight in the middle: one order."""

    def keys(world_size: int, consumed: int, batches: int) -> list[bytes]:
        found: list[list[bytes]] = []
        for rank in range(world_size):
            rest: dict[str, Any] = {"rank": rank, "world_size": world_size, "shares": CHANGED}
            stream = (
                ImageStream(run / "prepare", "train", 3, **rest)
                if kind == "images"
                else TokenSampler(run / "tokenize", "train", 3, **rest)
            )
            name = "images" if kind == "images" else "text"
            taken = islice(stream.batches(consumed, 16), batches)
            found.append([row.numpy().tobytes() for batch in taken for row in batch[name]])
        share = 16 // world_size
        return [own[step * share + row] for step in range(batches) for own in found for row in range(share)]

    alone = keys(1, 0, 120)
    assert keys(2, 0, 90) + keys(1, 1_440, 9) + keys(4, 1_584, 21) == alone
    counts = Counter(alone[:1_000])
    assert len(counts) == read_index(run / "prepare")["splits"]["train"]["samples"]


def test_names_that_two_sources_share_are_two_samples_and_on_one_side(run: Path) -> None:
    index = read_index(run / "prepare")
    keys = {split: [sample.key for sample in read_samples(run / "prepare", split)] for split in ("train", "val")}
    assert index["rejected"]["samples"] == 0
    assert [sum(index["splits"][split]["sources"][source] for split in keys) for source in (0, 1)] == [50, 30]
    names = {split: {key.removeprefix("source-1%2F") for key in found} for split, found in keys.items()}
    assert not names["train"] & names["val"]
    sizes = [", ".join(map(str, index["splits"][split]["sources"])) for split in ("train", "val")]
    told = "\n".join(inspect_directory(run / "prepare", None, verify=False))
    assert all(f"of its sources: {size} samples" in told for size in sizes)
    # One source after the other, as the order expects it.
    for split, found in keys.items():
        first = index["splits"][split]["sources"][0]
        assert [key.startswith("source-1") for key in found] == [row >= first for row in range(len(found))]


def test_each_source_has_its_own_filters_and_is_told_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    strict = _folder(tmp_path / "b", 12, filters={"max_caption_length": 14})  # "image number 1" has 14
    prepare(tmp_path / "out", _config(_folder(tmp_path / "a", 12), strict, max_rejected_fraction=0.5), seed=0)
    lines = [json.loads(line) for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"], line["source"]) for line in lines] == [
        ("00010", "caption length", "folder-1"),
        ("00011", "caption length", "folder-1"),
    ]
    assert "folder-1: 10 samples kept, 2 rejected (2 caption length)" in caplog.text
    assert read_index(tmp_path / "out")["splits"]["train"]["sources"] == [12, 10]


@pytest.mark.parametrize("own", [{}, {"weight": 0.3}, {"filters": {}}])
def test_what_each_source_leaves_out_is_counted_whatever_it_sets_of_its_own(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    a, b = _folder(tmp_path / "a", 4), _folder(tmp_path / "b", 4, start=4, **own)
    for path in (tmp_path / "a/.hidden.png", tmp_path / "b/.hidden.png"):
        path.touch()
    index = prepare(tmp_path / "out", _config(a, b, validation_fraction=0), seed=0)
    assert index["left_out"] == {"hidden or system file": 2}
    assert index["source_samples"] == 10


def test_near_duplicates_are_found_across_the_sources_that_ask_alike(tmp_path: Path) -> None:
    folders = [_folder(tmp_path / name, 3) for name in "abc"]

    def kept(*bits: int | None) -> list[int]:
        filters = [None if asked is None else {"near_duplicate_bits": asked} for asked in bits]
        sources = [folder | {"filters": own} for folder, own in zip(folders, filters, strict=True)]
        config = _config(*sources, max_rejected_fraction=1, validation_fraction=0, shard_size=2)
        return list(prepare(tmp_path / f"out-{bits}", config, seed=0)["splits"]["train"]["sources"])

    assert kept(None, None, None) == [3, 3, 3]
    assert kept(0, None, 3) == [3, 3, 3]
    with pytest.raises(UserError, match="expected training samples of folder-2"):  # which is the second again
        kept(None, 0, 0)
    image(7).save(tmp_path / "c/00000.png")
    assert kept(3, None, 3) == [3, 3, 1]
    with pytest.raises(UserError, match="expected training samples of folder-1"):
        kept(3, 3, None)


def test_another_weight_prepares_nothing_again_and_a_source_that_grows_moves_no_other(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", 6), _folder(tmp_path / "b", 6, start=20)
    config = _config(a, b, shard_size=2, validation_fraction=0)
    prepare(tmp_path / "out", config, seed=0)
    before = tree_bytes(tmp_path / "out")
    weighted = _config(a | {"weight": 3}, b, shard_size=2, validation_fraction=0)
    assert identity(weighted) == identity(config)
    assert weighted.source_shares == (750, 250)
    prepare(tmp_path / "out", weighted, seed=0)
    assert tree_bytes(tmp_path / "out") == before
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/train").glob("1-*.tar")}
    write_folder(tmp_path / "a", 3, start=6)
    prepare(tmp_path / "out", config, seed=0)
    assert len(times) == 3
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_one_source_in_a_list_has_the_bytes_and_the_order_of_one_alone(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "a", 10)
    values = {"image_size": 16, "workers": 1, "shard_size": 4, "validation_fraction": 0}
    alone = PrepareConfig.model_validate({"source": folder, **values})
    listed = PrepareConfig.model_validate({"sources": [folder], **values})
    for name, config in (("alone", alone), ("listed", listed)):
        prepare(tmp_path / name, config, seed=0)
    assert tree_bytes(tmp_path / "alone") == tree_bytes(tmp_path / "listed")
    assert listed.source_shares == ()


def test_the_stamp_has_a_word_for_each_source_and_what_cannot_be_seen_is_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(_folder(tmp_path / "a", 2), _folder(tmp_path / "b", 2))
    before = stamp_of_all(config.all_sources)
    monkeypatch.setitem(outside._STAMPS, "prepare", lambda config: stamp_of_all(config.prepare.all_sources))
    pipeline = cast(PipelineConfig, SimpleNamespace(prepare=config))

    def changes() -> list[str]:
        return outside.changes("prepare", pipeline, before)

    assert changes() == []
    (tmp_path / "b").rename(tmp_path / "away")
    assert changes() == []
    write_folder(tmp_path / "a", 1, start=9)
    assert changes() == ["what it reads from outside has changed"]


FOLDER = {"kind": "folder", "path": "photos"}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "expected one of prepare.source and prepare.sources, found none"),
        ({"source": FOLDER, "sources": [FOLDER]}, "expected one of prepare.source and prepare.sources, found both"),
        ({"sources": []}, "at least 1 item"),
        ({"sources": [FOLDER, FOLDER | {"weight": 0}]}, "sources.1.weight': Input should be greater than 0, found 0"),
        ({"sources": [FOLDER | {"weight": -1.5}]}, "greater than 0, found -1.5"),
        (
            {"sources": [FOLDER, FOLDER | {"weight": 0.0004}]},
            "a thousandth of their sum, found less at folder-1: raise",
        ),
        ({"sources": [FOLDER, {"kind": "tfrecord"}]}, "tfrecord"),
        ({"sources": [FOLDER, {"weight": 1}]}, "sources.1': expected a section with a kind"),
        ({"source": FOLDER | {"weight": 2}}, "weight and filters are of prepare.sources"),
        ({"sources": [FOLDER], "storage": "in-place"}, "expected a source of kind webdataset, found folder"),
    ],
)
def test_a_mistake_about_sources_is_told_in_one_line(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(PrepareConfig, {"image_size": 16, **values}, where="a.yaml")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_source_of_which_nothing_is_kept_or_found_is_named(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", 3), _folder(tmp_path / "b", 3, filters={"min_side": 500})
    with pytest.raises(UserError, match=r"expected training samples of folder-1, found none; .*rejected.jsonl says"):
        prepare(tmp_path / "out", _config(a, b, max_rejected_fraction=1, validation_fraction=0), seed=0)
    with pytest.raises(UserError, match=r"3 of 3 samples of folder-1 rejected \(3 too small\), at most 10%"):
        prepare(tmp_path / "out", _config(a, b, validation_fraction=0), seed=0)
    with pytest.raises(UserError, match=r"prepare.*no/where"):
        prepare(tmp_path / "out", _config(a, {"kind": "folder", "path": "no/where"}), seed=0)


def test_shares_of_other_sources_than_were_prepared_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"expected samples of 3 sources, found those of 2"):
        TokenSampler(run / "tokenize", "train", 0, shares=[(0, (500, 250, 250))])
