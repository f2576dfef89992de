"""`training.keep_best`: the checkpoint of the best evaluation stays, and is the result, killed anywhere or not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.config.base import identity, parse_config
from pipeline.config.training import TrainingConfig
from pipeline.core import signals
from pipeline.core.atomic_io import read_json
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.report.run_facts import read_facts
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.consolidate import export_step
from pipeline.training.engines.base import Batch
from pipeline.training.state import State
from pipeline.training.stopping import stoppable
from pipeline.training.trainer import Trainer
from tests.conftest import NO_TRACKING
from tests.launch import launch
from tests.training.engine_worker import BATCH
from tests.training.test_resume import BEFORE_THE_TRANSFORMER, _killed, _metrics, _outputs, _prepared
from tests.training.test_trainer import SmallWorkload, _repeatable, _steps_on_disk, _train

NAN = float("nan")
SETTINGS: dict[str, Any] = {"log_every": 2, "evaluate_every": 2, "log_images_every": 100, "keep_checkpoints": 1}
SETTINGS |= {"checkpoint_every": 3, "keep_best": {"metric": "val/loss", "mode": "min"}}


class Scripted(SmallWorkload):
    """A training whose n-th evaluation, after 2n steps, finds `values[n - 1]`."""

    def __init__(self, *values: float, stop_at: int = 0, in_images: bool = False) -> None:
        """`stop_at`: the step whose evaluation is asked to stop, after its first batch or in its images."""
        super().__init__()
        self.values, self.stop_at, self.in_images = values, stop_at, in_images

    def batches(self, consumed: int) -> Iterator[Batch]:
        self.step = consumed // BATCH
        return super().batches(consumed)

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        for _ in stoppable(range(2)):
            self._ask_to_stop(not self.in_images)
        return {"val/loss": self.values[(self.step + 1) // 2 - 1], "val/accuracy": 0.5}

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        for _ in stoppable(range(2)):
            self._ask_to_stop(self.in_images)
        return super().sample_images(objective, in_step)

    def _ask_to_stop(self, here: bool) -> None:
        if here and self.step == self.stop_at:
            signals._requested = "SIGUSR2"


@pytest.fixture(autouse=True)
def _nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", None)


def _best(lines: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(line["best/step"], line["best/val/loss"]) for line in lines if "best/step" in line]


def _weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / f"checkpoints/step-{step:08d}/training.pt")[0]
    return weights


def test_the_best_checkpoint_stays_beside_the_last_and_the_training_ends_with_its_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workload = Scripted(NAN, 5, 2, 2, 3)
    with caplog.at_level(logging.INFO):
        lines = _train(tmp_path, workload, steps=10, ema_decay=None, **SETTINGS)
    assert _steps_on_disk(tmp_path) == [6, 10]
    assert _best(lines) == [(4, 5), (6, 2), (6, 2), (6, 2)]
    assert "small: best val/loss 2 at step 6: the result has the weights of that step" in caplog.text
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "sample-00000006.png",
        "sample-00000010.png",
    ]
    for name, value in workload.objective.state_dict().items():
        assert torch.equal(value, _weights(tmp_path, 6)[name])
    _train(tmp_path, again := Scripted(), steps=10, ema_decay=None, **SETTINGS)  # killed after its last checkpoint
    for name, value in workload.objective.state_dict().items():
        assert torch.equal(value, again.objective.state_dict()[name])


def test_the_result_has_the_average_of_the_best_step(tmp_path: Path) -> None:
    best = Scripted(1, 2, 3)
    _train(tmp_path / "best", best, steps=6, **SETTINGS)
    alone = Scripted(1)
    _train(tmp_path / "alone", alone, steps=2, schedule="constant", **SETTINGS)
    ends = best.objective.state_dict(), alone.objective.state_dict()
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())


def test_larger_is_better_with_max(tmp_path: Path) -> None:
    settings = SETTINGS | {"keep_best": {"metric": "val/loss", "mode": "max"}}
    assert _best(_train(tmp_path, Scripted(5, 7, 6), steps=6, **settings))[-1] == (4, 7)


KILLS: dict[str, Any] = {"steps": 8, "async_checkpoints": False} | SETTINGS | {"checkpoint_every": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, float]], Scripted]:
    """A training whose second evaluation is the best, after 4 of 8 steps."""
    workload = Scripted(5, 2, 4, 6)
    return _train(tmp_path_factory.mktemp("undisturbed"), workload, **KILLS), workload


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        ("before the save", 4),
        ("in the save", 4),
        ("in the save", 5),
        ("before old ones are deleted", 4),
        ("before old ones are deleted", 6),
    ],
)
def test_killed_around_a_save_it_has_the_old_best_or_the_new_one_and_ends_as_if_undisturbed(
    moment: str,
    step: int,
    undisturbed: tuple[list[dict[str, float]], Scripted],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        _die(patched, moment, step)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path, Scripted(5, 2, 4, 6), **KILLS)
    newest = tmp_path / f"checkpoints/step-{_steps_on_disk(tmp_path)[-1]:08d}"
    best = read_json(newest / "trainer.json")["best"]["step"]
    assert best == (2 if step == 4 and moment != "before old ones are deleted" else 4)
    assert (tmp_path / f"checkpoints/step-{best:08d}/manifest.json").is_file()
    resumed = _train(tmp_path, found := Scripted(5, 2, 4, 6), **KILLS)
    assert _repeatable(resumed) == _repeatable(undisturbed[0])
    assert _steps_on_disk(tmp_path) == [4, 8]
    for name, value in undisturbed[1].objective.state_dict().items():
        assert torch.equal(value, found.objective.state_dict()[name])


def _die(patched: pytest.MonkeyPatch, moment: str, step: int) -> None:
    """In place of SIGKILL at a moment of the save after `step` steps."""
    name, owner = {
        "before the save": ("_files", Trainer),
        "in the save": ("_complete", Checkpoints),
        "before old ones are deleted": ("_forget_old", Checkpoints),
    }[moment]
    method = getattr(owner, name)

    def die(self: Any, *arguments: Any) -> Any:
        now = self.state.step if isinstance(self, Trainer) else getattr(arguments[0], "step", arguments[0])
        if now == step:
            raise KeyboardInterrupt
        return method(self, *arguments)

    patched.setattr(owner, name, die)


@pytest.mark.parametrize(("stopped_at", "in_images"), [(2, False), (4, True), (6, False), (6, True)])
def test_an_evaluation_that_a_stop_ended_is_judged_once_by_the_resumed_training(
    stopped_at: int, in_images: bool, tmp_path: Path
) -> None:
    settings = SETTINGS | {"steps": 6, "log_images_every": 2}
    undisturbed = _train(tmp_path / "undisturbed", Scripted(3, 2, 1), **settings)
    run = tmp_path / "stopped"
    with pytest.raises(StoppedOnRequest):
        _train(run, Scripted(3, 2, 1, stop_at=stopped_at, in_images=in_images), **settings)
    signals._requested = None
    assert _repeatable(_train(run, Scripted(3, 2, 1), **settings)) == _repeatable(undisturbed)
    best = read_json(run / "checkpoints/step-00000006/trainer.json")["best"]
    assert best == {"step": 6, "value": 1, "evaluations_since": 0}


def test_a_training_that_falls_back_to_the_checkpoint_before_has_the_best_one_of_then(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 5)):
        checkpoints.save(step, {"a.json": step}, best)
    assert sorted(int(path.name[-1]) for path in tmp_path.iterdir()) == [3, 4, 5]  # 4 names 3
    checkpoints.save(6, {"a.json": 6}, 5)
    assert sorted(int(path.name[-1]) for path in tmp_path.iterdir()) == [5, 6]


def test_a_metric_that_no_evaluation_has_is_one_line_with_those_there_are(tmp_path: Path) -> None:
    settings = SETTINGS | {"keep_best": {"metric": "loss", "mode": "min"}}
    with pytest.raises(UserError, match=r"found 'loss': set one of val/accuracy, val/loss$"):
        _train(tmp_path, Scripted(1), steps=6, **settings)


def test_a_damaged_best_checkpoint_is_an_error_and_the_next_start_goes_on_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Damages(Scripted):
        def evaluate(self, objective: nn.Module) -> dict[str, float]:
            if self.step == 6:
                (tmp_path / "checkpoints/step-00000002/training.pt").write_bytes(b"")
            return super().evaluate(objective)

    with pytest.raises(UserError, match=r"step-00000002: expected the best checkpoint, found a damaged one"):
        _train(tmp_path, Damages(1, 2, 3), steps=6, **SETTINGS)
    with caplog.at_level(logging.WARNING):
        _train(tmp_path, Scripted(), steps=6, **SETTINGS)
    assert "step-00000002, is not usable (training.pt" in caplog.text
    assert "the result is that of the last step" in caplog.text


def test_patience_ends_the_training_after_so_many_evaluations_without_a_better_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SETTINGS | {"keep_best": {"metric": "val/loss", "mode": "min", "patience": 2}}
    with caplog.at_level(logging.INFO):
        undisturbed = _train(tmp_path / "undisturbed", Scripted(5, 3, 4, 3), steps=100, **settings)
    assert _steps_on_disk(tmp_path / "undisturbed") == [4, 8]
    assert "at step 4: the result has the weights of that step; ended early, at step 8 of 100" in caplog.text
    images = sorted(path.name for path in (tmp_path / "undisturbed/images").iterdir())
    assert images == ["sample-00000004.png", "sample-00000008.png"]
    with monkeypatch.context() as patched:
        _die(patched, "before the save", 8)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path / "killed", Scripted(5, 3, 4, 3), steps=100, **settings)
    assert _repeatable(_train(tmp_path / "killed", Scripted(5, 3, 4, 3), steps=100, **settings)) == _repeatable(
        undisturbed
    )
    _train(tmp_path / "killed", Scripted(), steps=100, **settings)  # it is over


def test_a_training_that_patience_ends_between_two_log_lines_writes_the_last_one(tmp_path: Path) -> None:
    settings = SETTINGS | {"keep_best": {"metric": "val/loss", "mode": "min", "patience": 1}, "log_every": 3}
    lines = _train(tmp_path, Scripted(2, 3), steps=100, **settings)
    assert [line["step"] for line in lines if "loss" in line] == [3, 4]


def test_asked_to_stop_in_the_results_images_a_training_samples_them_when_it_goes_on(tmp_path: Path) -> None:
    settings = SETTINGS | {"steps": 4, "log_images_every": 4}

    class AskedAtTheEnd(Scripted):
        shown = 0

        def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
            self.shown += 1
            if self.shown == 2:
                signals._requested = "SIGTERM"
            return super().sample_images(objective, in_step)

    with pytest.raises(StoppedOnRequest, match="stopped before the images of step 2"):
        _train(tmp_path, AskedAtTheEnd(1, 2), **settings)
    assert not (tmp_path / "images/sample-00000002.png").exists()
    signals._requested = None
    _train(tmp_path, Scripted(), **settings)
    assert (tmp_path / "images/sample-00000002.png").exists()


def test_off_it_is_not_in_the_identity_and_no_checkpoint_names_a_best_one(tmp_path: Path) -> None:
    training: dict[str, object] = {"steps": 6, "batch_size": 4, "warmup_steps": 0}
    assert "keep_best" not in identity(parse_config(TrainingConfig, training, "config"))
    keeping = parse_config(TrainingConfig, training | {"keep_best": SETTINGS["keep_best"]}, "config")
    assert identity(keeping)["keep_best"] == {"metric": "val/loss", "mode": "min", "patience": None}
    lines = _train(tmp_path, Scripted(3, 1, 2), steps=6, **SETTINGS | {"keep_best": None})
    assert not _best(lines)
    assert _steps_on_disk(tmp_path) == [6]
    assert set(read_json(tmp_path / "checkpoints/step-00000006/manifest.json")) == {"step", "files"}


def test_a_checkpoint_from_before_there_was_a_best_one_is_readable(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text(
        '{"step": 3, "nonfinite_steps": 0, "nonfinite_in_a_row": 0, "sums": {}, "count": 0, "evaluation_stopped": null}'
    )
    assert State.read(tmp_path / "trainer.json") == State(step=3)


@pytest.mark.slow
def test_a_killed_transformer_chooses_the_same_best_step_whose_weights_are_the_model(
    tiny_run: Path, tmp_path: Path
) -> None:
    overrides = [
        "transformer.training.keep_best={metric: val/loss/image, mode: max}",  # it falls: the first one is the largest
        "transformer.training.evaluate_every=10",
        "transformer.training.ema_decay=0.9",
        "transformer.deepspeed.zero_stage=3",
        NO_TRACKING,
    ]
    undisturbed, killed = (
        _prepared(tiny_run, tmp_path / name, *BEFORE_THE_TRANSFORMER) for name in ("undisturbed", "killed")
    )
    told = launch("stages.transformer", "--config", str(undisturbed / "config.yaml"), *overrides)
    assert "at step 10: the result has the weights of that step" in told
    _killed(tmp_path / "killed", "transformer", lambda run: (run / "checkpoints/step-00000020").exists(), *overrides)
    assert "resuming from step" in launch("stages.transformer", "--config", str(killed / "config.yaml"), *overrides)
    assert _outputs(killed, "transformer") == _outputs(undisturbed, "transformer")
    assert _metrics(killed, "transformer") == _metrics(undisturbed, "transformer")
    folder, _ = export_step(undisturbed, "transformer", 10)
    assert (folder / "model.safetensors").read_bytes() == (
        undisturbed / "transformer/model/model.safetensors"
    ).read_bytes()
    assert (undisturbed / "transformer/samples.png").read_bytes() == (
        undisturbed / "transformer/images/samples-00000010.png"
    ).read_bytes()
    stages = {name: undisturbed / name for name in ("prepare", "transformer")}
    best = read_facts(stages).stages["transformer"].best
    assert best
    assert (best[0], best[2]) == ("val/loss/image", 10)
