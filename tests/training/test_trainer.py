"""The loop reports a training that diverges and how fast it is, and stops inside an evaluation."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config.training import TrainingConfig
from pipeline.core import signals
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.manifest import FileRecord
from pipeline.core.metric_names import CLOCK_METRICS
from pipeline.core.objective import Objective
from pipeline.data.prefetch import load
from pipeline.orchestration.stage_run import StageRun
from pipeline.orchestration.tracking import Tracker
from pipeline.training import checkpoint
from pipeline.training.checkpoint_files import Files
from pipeline.training.engines.base import Batch, Metrics, Update, shards_of_replicated
from pipeline.training.sharded_state import ShardedState, TensorShard
from pipeline.training.stopping import LookOut, stoppable
from pipeline.training.throughput import Speedometer
from pipeline.training.trainer import Trainer
from tests.launch import launch
from tests.training.engine_worker import BATCH, SmallObjective, global_batch


def test_a_training_that_diverges_stops_and_says_what_to_try(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("transformer", "generate", "evaluate", "report"))
    overrides = [
        "transformer.training.learning_rate=1e30",
        "transformer.training.max_nonfinite_steps=3",
        "transformer.training.precision=fp32",
        "transformer.deepspeed.zero_stage=0",
    ]
    output = launch("stages.transformer", "--config", str(run / "config.yaml"), *overrides, check=False)
    assert "expected finite gradients, found 3 non-finite steps in a row at step" in output
    assert "lower training.learning_rate" in output
    assert "Traceback" not in output


def test_speed_memory_and_gradient_norm_are_among_the_metrics(tiny_run: Path) -> None:
    for stage, names in (("image-tokenizer", set(CLOCK_METRICS) - {"tokens_per_s"}), ("transformer", CLOCK_METRICS)):
        lines = [json.loads(line) for line in (tiny_run / stage / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "samples_per_s" in line]
        assert logged
        for line in logged:
            assert all(line[name] > 0 for name in [*names, "gradient_norm", "learning_rate"])
            assert line["mfu"] < 2  # of matrix products measured on a busy machine


class PlainEngine:
    """The engine of one process in plain PyTorch. See `pipeline.training.engines.base.Engine`."""

    in_step = False

    def __init__(self, objective: Objective, nonfinite: Collection[int] = ()) -> None:
        """`nonfinite`: 1-based steps whose gradients are said not to be finite."""
        self.objective, self.model = objective, objective
        self.optimizer = torch.optim.AdamW(objective.parameters())
        self.nonfinite = nonfinite
        self.step = 0

    def accumulate(self, batch: Batch, step: int, loss_scale: float, last: bool) -> Metrics:
        self.step = step + 1
        loss, _ = self.model(batch, step)
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}

    def update(self, learning_rate_factor: float) -> Update:
        applied = self.step not in self.nonfinite
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(torch.tensor(1.0 if applied else float("nan")), torch.tensor(applied))

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext()

    def local_parameters(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self.objective.named_parameters()}

    def sync_parameters(self) -> None: ...

    def gathered_outside_blocks(self) -> AbstractContextManager[None]:
        return nullcontext()

    def local_shards(self, values: dict[str, Tensor]) -> list[TensorShard]:
        return shards_of_replicated(values)

    def read_shards(self, values: dict[str, Tensor], saved: ShardedState) -> None:
        for name, value in values.items():
            saved.read_into(name, 0, value.view(-1))

    def checkpoint_files(self, with_optimizer: bool = True) -> Files:
        return {"training.pt": [self.objective.state_dict(), self.optimizer.state_dict()][: 1 + with_optimizer]}

    def load(self, directory: Path) -> None:
        model, *optimizer = torch.load(directory / "training.pt")
        self.objective.load_state_dict(model)
        for states in optimizer:  # dropped after the last step, with keep_optimizer: false
            self.optimizer.load_state_dict(states)


class SmallWorkload:
    """A training of a moment. `at_batch(step, number)` is called before each batch of an evaluation."""

    tokens_per_sample, data_metrics = None, staticmethod(lambda samples: {})

    def __init__(self, at_batch: Callable[[int, int], None] = lambda step, number: None) -> None:
        torch.manual_seed(0)
        self.objective = SmallObjective()
        self.at_batch = at_batch
        self.step = -1

    def batches(self, consumed: int) -> Iterator[Batch]:
        for step in count(consumed // BATCH):
            self.step = step + 1  # steps done, once this batch is used
            yield global_batch(step)

    def evaluate(self, objective: nn.Module) -> dict[str, float]:
        losses = []
        for number in stoppable(range(4)):
            self.at_batch(self.step, number)
            losses.append(float(objective(global_batch(-1 - number), 0)[0]))
        return {"val/loss": sum(losses)}

    def sample_images(self, objective: nn.Module, in_step: bool) -> dict[str, Image.Image]:
        return {"sample": Image.new("RGB", (1, 1))}


def _train(
    folder: Path, workload: SmallWorkload, nonfinite: Collection[int] = (), **training: Any
) -> list[dict[str, float]]:
    """Train in `folder`, or resume there; the lines of metrics.jsonl."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").touch()
    settings = {"steps": 6, "batch_size": BATCH, "log_every": 2, "evaluate_every": 2, "log_images_every": 4}
    config = TrainingConfig(**settings | {"checkpoint_every": 3, "ema_decay": 0.9, "warmup_steps": 0} | training)
    stage = SimpleNamespace(
        name="small", config=SimpleNamespace(seed=0), training_seed=0, directory=folder, tracker=Tracker(folder, None)
    )
    speed = Speedometer(config, workload, "accelerate")
    try:
        Trainer(cast(StageRun, stage), config, workload, PlainEngine(workload.objective, nonfinite), speed).run()
    finally:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines


def _repeatable(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    clock = ("time", "system/", *CLOCK_METRICS)
    return [{name: value for name, value in line.items() if not name.startswith(clock)} for line in lines]


def _ask_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_requested", "SIGUSR2")


@pytest.mark.parametrize(("step", "number"), [(2, 0), (2, 3), (4, 1), (6, 2)])
def test_a_stop_inside_an_evaluation_waits_for_one_batch_and_the_evaluation_is_done_again(
    step: int, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _train(tmp_path / "undisturbed", SmallWorkload())
    done: list[int] = []

    def stop(now: int, batch: int) -> None:
        if now == step:
            done.append(batch)
            if batch == number:
                _ask_to_stop(monkeypatch)

    stopped = tmp_path / "stopped"
    with pytest.raises(StoppedOnRequest, match=f"stopped at step {step}/6: SIGUSR2"):
        _train(stopped, SmallWorkload(stop))
    assert done == list(range(number + 1))
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in lines if line["step"] == step and "val/loss" in line]
    assert not list(stopped.glob(f"images/*{step}.png"))

    class KilledError(Exception):
        """In place of SIGKILL."""

    def die(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr(signals, "_requested", None)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step" if step < 6 else "_save", die)  # after it has logged the second try
        with pytest.raises(KilledError):
            _train(stopped, SmallWorkload())
    assert _repeatable(_train(stopped, SmallWorkload())) == _repeatable(undisturbed)
    assert sorted(p.name for p in stopped.glob("images/*")) == sorted(
        p.name for p in (tmp_path / "undisturbed").glob("images/*")
    )


def test_asked_to_stop_before_an_evaluation_no_batch_of_it_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(step: int, number: int) -> None:
        raise AssertionError

    with monkeypatch.context() as patched:
        _ask_to_stop(patched)
        with pytest.raises(StoppedOnRequest, match="stopped at step 1/6"):
            _train(tmp_path, SmallWorkload(refuse), evaluate_every=1, log_every=1)
    undisturbed = _train(tmp_path / "undisturbed", SmallWorkload(), evaluate_every=1, log_every=1)
    resumed = _train(tmp_path, SmallWorkload(), evaluate_every=1, log_every=1)
    assert _repeatable(resumed) == _repeatable(undisturbed)
    assert all(line["samples_per_s"] > 0 for line in resumed if "samples_per_s" in line)


@pytest.mark.slow
def test_the_time_of_checkpoints_and_evaluations_is_not_in_samples_per_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_save(engine: PlainEngine, with_optimizer: bool) -> Files:
        time.sleep(0.5)
        return {}

    monkeypatch.setattr(PlainEngine, "checkpoint_files", slow_save)
    workload = SmallWorkload(lambda step, number: time.sleep(0.1))
    lines = _train(tmp_path, workload, steps=3, log_every=3, evaluate_every=2, checkpoint_every=1)
    (speed,) = [line["samples_per_s"] for line in lines if "samples_per_s" in line]
    assert speed > 3 * BATCH / 0.5  # three steps of milliseconds, around two checkpoints and an evaluation


@pytest.mark.slow
def test_the_end_waits_for_its_checkpoint_and_a_finished_training_may_drop_what_only_a_resume_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_files

    def write_slowly(directory: Path, files: Files) -> dict[str, FileRecord]:
        time.sleep(0.2)
        return write(directory, files)

    monkeypatch.setattr(checkpoint, "write_files", write_slowly)
    _train(tmp_path / "kept", SmallWorkload(), steps=7, log_every=7, evaluate_every=7, checkpoint_every=3)
    assert _steps_on_disk(tmp_path / "kept") == [6, 7]
    settings = {"steps": 7, "log_every": 7, "evaluate_every": 7, "checkpoint_every": 3, "keep_optimizer": False}
    _train(tmp_path / "dropped", SmallWorkload(), **settings)
    assert _steps_on_disk(tmp_path / "dropped") == [7]
    saved = [torch.load(tmp_path / run / "checkpoints/step-00000007/training.pt") for run in ("kept", "dropped")]
    assert [len(state) for state in saved] == [2, 1]
    assert all(torch.equal(saved[0][0][name], saved[1][0][name]) for name in saved[0][0])


def test_a_stop_waits_for_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ask_to_stop(monkeypatch)
    with pytest.raises(StoppedOnRequest):
        _train(tmp_path, SmallWorkload())
    assert len(_steps_on_disk(tmp_path)) == 1
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_disk_that_refuses_in_the_background_ends_the_training_at_the_next_look_and_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Slow(SmallWorkload):
        def batches(self, consumed: int) -> Iterator[Batch]:
            for batch in super().batches(consumed):
                time.sleep(0.02)
                yield batch

    settings = {"steps": 40, "log_every": 40, "evaluate_every": 40, "checkpoint_every": 5, "stop_check_every": 1}
    workload = Slow()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_files", _from_the_second_on(refuse, checkpoint.write_files))
        with pytest.raises(UserError, match=r"step-00000010: .* found that the file system refuses"):
            _train(tmp_path, workload, **settings)
    assert workload.step < 15  # when the next save would wait for it
    assert _steps_on_disk(tmp_path) == [5]
    _train(tmp_path, SmallWorkload(), **settings)
    _train(tmp_path / "undisturbed", SmallWorkload(), **settings)
    ends = [torch.load(run / "checkpoints/step-00000040/training.pt") for run in (tmp_path, tmp_path / "undisturbed")]
    assert all(torch.equal(ends[0][0][name], value) for name, value in ends[1][0].items())


def _from_the_second_on(new: Callable[..., object], old: Callable[..., object]) -> Callable[..., object]:
    calls = count()
    return lambda *arguments: (new if next(calls) else old)(*arguments)


def _steps_on_disk(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").glob("step-????????"))


def test_a_line_has_the_mean_of_the_finite_steps_since_the_line_before(tmp_path: Path) -> None:
    class Noted(PlainEngine):
        losses: ClassVar[list[float]] = []

        def accumulate(self, batch: Batch, step: int, loss_scale: float, last: bool) -> Metrics:
            found = super().accumulate(batch, step, loss_scale, last)
            self.losses.append(float(found["loss"]))
            return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(globals(), "PlainEngine", Noted)
        lines = _train(tmp_path, SmallWorkload(), {2, 5}, log_every=3, micro_batch_size=BATCH // 2)
    steps = [sum(pair) / 2 for pair in zip(Noted.losses[::2], Noted.losses[1::2], strict=True)]
    logged = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in logged] == [(steps[0] + steps[2]) / 2, (steps[3] + steps[5]) / 2]
    assert [line["nonfinite_steps"] for line in logged] == [1, 2]
    assert [line["gradient_norm"] for line in logged] == [1, 1]  # not what was skipped


def test_nonfinite_steps_in_a_row_end_the_training_at_their_step_however_seldom_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 40, "log_every": 40, "evaluate_every": 40, "log_images_every": 40}
    settings |= {"max_nonfinite_steps": 3, "checkpoint_every": 40}
    monkeypatch.setattr(LookOut, "due", lambda look_out, step: look_out.every == 1)
    with pytest.raises(UserError, match="found 3 non-finite steps in a row at step 9: lower training.learning_rate"):
        _train(tmp_path / "seldom", SmallWorkload(), {3, 4, 7, 8, 9, 10}, stop_check_every=50, **settings)
    with pytest.raises(UserError, match="found 3 non-finite steps in a row at step 9"):
        _train(tmp_path / "often", SmallWorkload(), {3, 4, 7, 8, 9, 10, 11}, stop_check_every=1, **settings)
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_a_checkpoint_is_never_saved_behind_too_many_nonfinite_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LookOut, "due", lambda look_out, step: False)
    settings = {"checkpoint_every": 5, "max_nonfinite_steps": 2, "evaluate_every": 6, "log_every": 6}
    with pytest.raises(UserError, match="in a row at step 4"):
        _train(tmp_path, SmallWorkload(), {3, 4}, log_images_every=6, **settings)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_training_that_ends_in_any_way_leaves_no_loading_thread_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loaded(SmallWorkload):
        def batches(self, consumed: int) -> Iterator[Batch]:
            yield from load(super().batches(consumed), torch.device("cpu"))

    def loading() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "batches"]

    _train(tmp_path / "finished", Loaded())
    assert not loading()
    failure: pytest.ExceptionInfo[Exception]
    with pytest.raises(UserError) as failure:  # its traceback keeps the frames of the training alive
        _train(tmp_path / "failed", Loaded(), range(20), max_nonfinite_steps=2)
    assert not loading(), failure
    _ask_to_stop(monkeypatch)
    with pytest.raises(StoppedOnRequest) as failure:
        _train(tmp_path / "stopped", Loaded())
    assert not loading(), failure


def test_an_objective_is_asked_for_what_a_user_should_know_with_each_line_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, asked = SmallWorkload(), list[int]()
    monkeypatch.setattr(workload.objective, "report", asked.append)
    _train(tmp_path / "run", workload)
    assert asked == [2, 4, 6]


def test_an_objective_sees_a_steps_micro_batches_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload, seen = SmallWorkload(), list[tuple[int, int, bool]]()
    monkeypatch.setattr(
        workload.objective, "look_ahead", lambda parts, step: seen.append((step, len(parts), torch.is_grad_enabled()))
    )
    _train(tmp_path / "whole", workload)
    assert not seen
    _train(tmp_path / "parts", workload, micro_batch_size=BATCH // 4)
    assert seen == [(step, 4, False) for step in range(6)]


def test_profiled_steps_leave_a_trace_that_mlflow_gets(tmp_path: Path) -> None:
    _train(tmp_path / "run", SmallWorkload(), profile={"start": 2, "steps": 1})
    trace = tmp_path / "run" / "profile" / "rank-00000.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("addmm" in event["name"] for event in events)
    lines = (tmp_path / "run" / "tracking.jsonl").read_text().splitlines()
    assert any("profile/rank-00000.json.gz" in line for line in lines)
