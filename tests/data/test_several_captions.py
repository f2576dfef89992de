"""`prepare.caption: random`: every caption is kept and encoded, training takes another one each epoch."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.cli.main import cli
from pipeline.config.base import identity
from pipeline.config.pipeline import load_pipeline
from pipeline.config.tokenize import TokenizeConfig
from pipeline.core.errors import UserError
from pipeline.data import sampler
from pipeline.data.order import caption_in_epoch
from pipeline.data.prepare import prepare
from pipeline.data.sampler import TokenSampler
from pipeline.data.shards import PrepareIndex, read_index, read_samples
from pipeline.data.stream import ImageStream
from pipeline.data.tokens import TokenArrays
from pipeline.orchestration.stage_run import StageRun
from pipeline.report.run_facts import read_facts
from pipeline.text_tokenizer.bpe import EncodeWithDropout, TextTokenizer
from stages import reranker as reranker_stage
from stages import transformer as transformer_stage
from tests.conftest import TINY
from tests.data.sample_images import prepare_config, tree_bytes, write_folder
from tests.data.small_run import make_small_run
from tests.launch import launch

IMAGES = 43


def _captions(number: int) -> list[str]:
    """One to four captions, each of which ends with a number of its own: 10 x the image's, and a digit."""
    return [f"caption {10 * number + k}" for k in range(1 + number % 4)]


def _table(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    write_folder(folder / "images", len(rows))
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"kind": "table", "path": str(folder / "t.jsonl"), "path_column": "file", "key_column": "key"}


def _rows(captions: list[Any]) -> list[dict[str, Any]]:
    return [{"key": f"{n:03d}", "file": f"images/{n:05d}.png", "caption": one} for n, one in enumerate(captions)]


def _prepared(folder: Path, captions: list[Any], **values: Any) -> PrepareIndex:
    config = prepare_config(_table(folder, _rows(captions)), caption="random", shard_size=16, **values)
    return prepare(folder / "out", config, seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Up to `tokenize`, of images with one to four captions."""
    folder = tmp_path_factory.mktemp("captions")
    source = _table(folder, _rows([_captions(n) for n in range(IMAGES)]))
    config = prepare_config(source, caption="random", shard_size=16, image_size=16, validation_fraction=0.2)
    return make_small_run(folder, IMAGES, TokenizeConfig(crops=2, batch_size=8), prepare_config=config)


def _drawn(run: Path, consumed: int, count: int, ranks: int, **options: Any) -> list[list[int]]:
    """The text ids of `count` global batches of 8 from `consumed` on, on `ranks` processes."""
    found, tokens = [], run / "tokenize"
    readers = [TokenSampler(tokens, "train", 5, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    for parts in zip(*(islice(reader.batches(consumed, 8), count) for reader in readers), strict=True):
        found += [row for part in parts for row in part["text"].tolist()]
    return found


def test_a_sample_has_each_of_its_captions_once_in_as_many_epochs_in_another_order_each_time() -> None:
    counts = np.repeat([1, 2, 3, 5, 8], 400)
    samples = np.arange(len(counts))
    epochs = [caption_in_epoch(7, samples, np.full(len(counts), epoch), counts) for epoch in range(240)]
    drawn = np.stack(epochs)
    for count in (1, 2, 3, 5, 8):
        turns = drawn[:, counts == count].reshape(240 // count, count, -1)
        assert (np.sort(turns, axis=1) == np.arange(count)[None, :, None]).all()
        first = np.bincount(turns[:, 0].ravel(), minlength=count) / turns[:, 0].size
        assert np.abs(first - 1 / count).max() < 0.02, "no caption comes first more often than another"
    assert (epochs[0] != caption_in_epoch(8, samples, np.zeros_like(counts), counts)).mean() > 0.3, "another seed"


def test_every_caption_is_kept_beside_its_image_and_the_first_is_the_plain_one(run: Path) -> None:
    samples = {s.key: s for split in ("train", "val") for s in read_samples(run / "prepare", split)}
    assert {key: list(one.captions) for key, one in samples.items()} == {
        f"{n:03d}": _captions(n) for n in range(IMAGES)
    }
    # What another tool reads of the tars: an image, its first caption.
    source = {"kind": "webdataset", "urls": str(run / "prepare/train/*.tar")}
    prepare(run / "again", prepare_config(source, validation_fraction=0), seed=0)
    again = list(read_samples(run / "again", "train"))
    assert len(again) == len(list(read_samples(run / "prepare", "train")))
    assert all(one.captions == samples[one.key].captions[:1] for one in again)


def test_captions_that_are_unusable_or_of_a_lost_image_are_counted_one_by_one(tmp_path: Path) -> None:
    captions = [["one", "", "two"], ["", " "], "alone", ["a", "b", "c"], ["same", "key"]]
    rows = _rows(captions)
    rows[4]["key"] = rows[0]["key"]
    source = _table(tmp_path, rows)
    (tmp_path / "images/00003.png").write_bytes(b"no image")
    config = prepare_config(source, caption="random", validation_fraction=0, max_rejected_fraction=1)
    index = prepare(tmp_path / "out", config, seed=0)
    assert [list(sample.captions) for sample in read_samples(tmp_path / "out", "train")] == [["one", "two"], ["alone"]]
    assert index["rejected"]["reasons"] == {"duplicate key": 2, "empty caption": 3, "not an image": 3}
    assert index.get("source_samples") == 11
    assert index["splits"]["train"]["shards"][0].get("captions") == 3
    with pytest.raises(UserError, match="8 of 11 samples rejected"):
        prepare(tmp_path / "out", config.model_copy(update={"max_rejected_fraction": 0.72}), seed=0)


def test_a_near_duplicate_takes_its_captions_along_and_all_are_counted(tmp_path: Path) -> None:
    index = _prepared(tmp_path, [["a", "b"], ["c", "d", "e"]], validation_fraction=0, max_rejected_fraction=1)
    assert index["rejected"]["samples"] == 0
    (tmp_path / "images/00001.png").write_bytes((tmp_path / "images/00000.png").read_bytes())
    config = prepare_config(
        {"kind": "table", "path": str(tmp_path / "t.jsonl"), "path_column": "file", "key_column": "key"},
        caption="random",
        shard_size=1,
        validation_fraction=0,
        max_rejected_fraction=1,
        filters={"near_duplicate_bits": 0},
    )
    index = prepare(tmp_path / "out", config, seed=0)
    assert index["rejected"]["reasons"] == {"near-duplicate": 3}
    assert [sample.captions for sample in read_samples(tmp_path / "out", "train")] == [("a", "b")]


def test_captions_one_an_image_give_the_shards_that_they_always_gave(tmp_path: Path) -> None:
    source = _table(tmp_path, _rows([f"caption {n}" for n in range(20)]))
    for caption in ("first", "random"):
        prepare(tmp_path / caption, prepare_config(source, caption=caption, validation_fraction=0.2), seed=0)
    first, drawn = (tree_bytes(tmp_path / caption) for caption in ("first", "random"))
    assert {name for name in first if first[name] != drawn[name]} == {"parts/000000.json"}  # its fingerprint
    assert "caption" not in identity(prepare_config(source)), "runs made before stay up to date"


def test_arrays_hold_the_ids_of_every_caption_and_are_read_by_sample_and_caption(run: Path) -> None:
    arrays, tokenizer = TokenArrays(run / "tokenize", "train"), TextTokenizer.from_pretrained(run / "text-tokenizer")
    own = [sample.captions for sample in read_samples(run / "prepare", "train")]
    samples = np.arange(len(own))
    assert arrays.caption_counts(samples).tolist() == [len(captions) for captions in own]
    last = arrays.caption_counts(samples) - 1
    for which, wanted in ((None, [captions[0] for captions in own]), (last, [captions[-1] for captions in own])):
        assert arrays.captions(samples, which) == wanted
        text, _ = arrays.gather(samples, 0 * samples, which)
        assert [tokenizer.decode(row) for row in text.tolist()] == wanted


def test_training_draws_one_caption_by_sample_and_epoch_whatever_the_ranks_and_wherever_it_resumes(run: Path) -> None:
    samples = len(TokenArrays(run / "tokenize", "train"))
    batches = 12 * samples // 8 + 1
    drawn = _drawn(run, 0, batches, 1, draw_captions=True)
    for ranks in (2, 4):
        assert drawn == _drawn(run, 0, batches, ranks, draw_captions=True)
    assert drawn[24:] == _drawn(run, 24, batches - 3, 2, draw_captions=True), "resumed in mid-epoch"
    assert samples % 8, "batches that hold two epochs are among these"
    tokenizer = TextTokenizer.from_pretrained(run / "text-tokenizer")
    counted = Counter(tokenizer.decode(row) for row in drawn[: 12 * samples])
    for sample in read_samples(run / "prepare", "train"):
        assert {counted[caption] for caption in sample.captions} == {12 // len(sample.captions)}


def test_what_does_not_draw_has_the_first_caption_always(run: Path) -> None:
    tokenizer = TextTokenizer.from_pretrained(run / "text-tokenizer")
    seen = {tokenizer.decode(row) for row in _drawn(run, 0, 20, 1)}
    assert seen == {sample.caption for sample in read_samples(run / "prepare", "train")}


@pytest.mark.parametrize("processors", [1, 3])
def test_captions_that_are_encoded_anew_are_those_that_were_drawn(
    run: Path, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "processors", lambda: processors)
    encode = EncodeWithDropout(TextTokenizer.from_pretrained(run / "text-tokenizer"), 0)
    stored = _drawn(run, 0, 12, 1, draw_captions=True)
    assert _drawn(run, 0, 12, 1, draw_captions=True, encode_caption=encode) == stored


def test_a_stream_of_images_tells_whose_caption_is_wanted_in_which_epoch(run: Path) -> None:
    def beside(samples: np.ndarray, epochs: np.ndarray) -> dict[str, torch.Tensor]:
        return {"sample": torch.from_numpy(samples), "epoch": torch.from_numpy(epochs)}

    stream = ImageStream(run / "prepare", "train", 5, rank=0, world_size=1, beside=beside)
    pixels = [np.asarray(sample.image).transpose(2, 0, 1) for sample in read_samples(run / "prepare", "train")]
    for number, batch in enumerate(islice(stream.batches(0, 8), 12)):
        assert batch["epoch"].tolist() == [(8 * number + k) // len(pixels) for k in range(8)]
        for image, sample in zip(batch["images"], batch["sample"].tolist(), strict=True):
            assert (image.numpy() == pixels[sample]).all()


def test_inspect_counts_samples_and_captions_of_shards_and_arrays(run: Path) -> None:
    output = CliRunner().invoke(cli, ["data", "inspect", str(run)], catch_exceptions=False).output
    splits = read_index(run / "prepare")["splits"]
    captions = sum(len(sample.captions) for sample in read_samples(run / "prepare", "train"))
    assert output.count(f"{splits['train']['samples']} samples with {captions} captions in") == 2
    assert f"{captions} different" in output


def test_both_trainings_draw_and_validation_does_not(run: Path) -> None:
    own = [sample.captions for sample in read_samples(run / "prepare", "train")]
    small = [
        "reranker.training.steps=1",
        "reranker.training.warmup_steps=0",
        "reranker.model.width=32",
        "reranker.model.heads=2",
    ]
    sizes = [f"{name}.training.batch_size=8" for name in ("transformer", "reranker")]
    config = load_pipeline(TINY, [*small, *sizes])
    stage_run = cast(
        StageRun, SimpleNamespace(config=config, training_seed=0, input=lambda name: run / name, source_shares=[])
    )
    tokenizer = TextTokenizer.from_pretrained(run / "text-tokenizer")
    transformer, ranker = transformer_stage.Workload(stage_run), reranker_stage.Workload(stage_run)
    for workload in (transformer, ranker):
        batches = islice(workload.batches(0), 3 * len(own) // 8)
        seen = {tokenizer.decode(ids) for batch in batches for ids in batch["text"]}
        assert seen <= {caption for captions in own for caption in captions}
        assert len(seen) > 1.5 * len(own), "within three epochs"
    first = {sample.caption for sample in read_samples(run / "prepare", "val")}
    batch = next(transformer.validation.batches(0, len(first)))
    assert {tokenizer.decode(ids) for ids in batch["text"]} == first


def test_the_report_has_both_counts(run: Path) -> None:
    facts = read_facts({"prepare": run / "prepare"})
    assert facts.captions == sum(len(sample.captions) for sample in read_samples(run / "prepare", "train"))


@pytest.mark.slow  # two stages' processes
def test_the_text_tokenizer_learns_from_all_captions_through_the_command_line(tmp_path: Path) -> None:
    source = _table(tmp_path, _rows([["a cat", "zebra zebra"]] * 30))
    overrides = [f"prepare.source={json.dumps(source)}", "prepare.caption=random", f"runs={tmp_path}"]
    overrides += ["generate.training_prompts=['zebra zebra']", "generate.new_prompts=[]", "generate.samples=8"]
    for stage in ("prepare", "text-tokenizer"):
        launch("pipeline", stage, "--config", str(TINY), *overrides, "tracking.enabled=false")
    stats = json.loads((tmp_path / "tiny/text-tokenizer/stats.json").read_text())
    assert stats["captions"] == 2 * read_index(tmp_path / "tiny/prepare")["splits"]["train"]["samples"]
    assert stats["tokens_per_caption/max"] == 2, "a whole word each"
    launch("pipeline", "data", "inspect", str(tmp_path / "tiny"))
