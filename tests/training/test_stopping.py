"""A stop request ends a loop before its next batch, on every process."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from PIL import Image

from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.training import TrainingConfig
from pipeline.core import signals
from pipeline.data.shards import Sample
from pipeline.reranker.model import TwoTowers
from pipeline.reranker.ranker import retrieval
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.training.stopping import EvaluationStopped, LookOut, evaluation_batches, stoppable
from stages import reranker
from tests.launch import launch
from tests.reranker.test_reranker import SMALL


def test_a_loop_ends_before_the_next_batch_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def numbers() -> Iterator[int]:
        for number in range(9):
            seen.append(number)
            yield number
            if number == 2:
                monkeypatch.setattr(signals, "_requested", "SIGTERM")

    with pytest.raises(EvaluationStopped):
        list(stoppable(numbers(), every=2))
    assert seen == [0, 1, 2, 3, 4]  # 4 was read, and looked at by nobody


def test_a_loop_that_nobody_stops_is_whole() -> None:
    assert list(stoppable("abc")) == ["a", "b", "c"]


def test_the_retrieval_of_the_reranker_ends_before_its_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, format="png")
    samples = [Sample(str(number), png.getvalue(), f"caption {number}", {}) for number in range(600)]
    tokenizer = TextTokenizer.train(["caption"], TextTokenizerConfig(vocab_size=280, text_length=4))
    towers = TwoTowers(SMALL, 8, tokenizer.text_length, tokenizer.vocab_size).eval()
    batches = []
    embed = towers.embed_images

    def stop(images: object) -> object:
        batches.append(images)
        monkeypatch.setattr(signals, "_requested", "SIGTERM")
        return embed(images)  # type: ignore[arg-type]

    monkeypatch.setattr(towers, "embed_images", stop)
    with pytest.raises(EvaluationStopped):
        retrieval(reranker._StoppableRanker(towers, tokenizer), samples, 5_000)
    assert len(batches) == 1


@pytest.mark.parametrize(("step_s", "steps"), [(0.0, 1), (0.001, 50), (0.5, 4), (1.9, 1), (60.0, 1)])
def test_a_training_looks_for_a_stop_every_so_many_steps_and_within_seconds_where_steps_are_slow(
    step_s: float, steps: int
) -> None:
    look_out = LookOut(every=50)
    assert look_out.due(1)
    look_out.looked(10, step_s)
    assert next(step for step in range(11, 70) if look_out.due(step)) == 10 + steps


@pytest.mark.slow  # two processes that import torch
def test_processes_of_different_speed_look_at_the_same_steps_and_all_see_the_stop_there() -> None:
    output = launch("tests.training.look_out_worker", processes=2)
    first, second = re.findall(r"looks((?: \d+(?:stop)?)+)", output)
    assert first == second
    *before, last = first.split()
    assert before
    assert last.endswith("stop")
    assert not any(look.endswith("stop") for look in before)


def test_an_evaluation_takes_a_hundredth_of_the_time_in_between_and_says_its_share_of_the_split(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = TrainingConfig(steps=9999, batch_size=8, evaluate_every=2000)
    with caplog.at_level("INFO"):
        taken = evaluation_batches(training, samples=4000)
    assert taken / 3 == pytest.approx(0.01 * training.evaluate_every)  # a forward pass is a third of a step
    assert "validation: 480 of 4000 samples (12 %), the same each time" in caplog.text
    assert evaluation_batches(training, samples=20) == 3  # no more than there are
    assert evaluation_batches(TrainingConfig(steps=9999, batch_size=8, evaluate_batches=5), samples=4000) == 5
