"""THE training loop, of every stage that trains. Engine and workload differ.

    seed -> batch -> forward and backward, micro-batch by micro-batch -> update -> log, evaluate, sample images, save

Exact resume rests on three things: the batch of step n is a function of the samples consumed before it,
all randomness of step n comes from a generator seeded by (seed, n, rank), and what a step changes
(weights, optimizer, moving average, running means) is in the checkpoint. So a process killed anywhere
and started again ends with the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from pipeline.config.base import digest
from pipeline.config.training import DeepSpeedConfig, TrainingConfig, accumulation_steps
from pipeline.core import distributed, malloc, signals, watchdog
from pipeline.core.checkpoint_names import saved_steps
from pipeline.core.errors import StoppedOnRequest, UserError
from pipeline.core.initial_values import InitialValues
from pipeline.core.progress import progress
from pipeline.orchestration.stage_run import StageRun
from pipeline.training.best import result_checkpoint, still_there
from pipeline.training.checkpoint import Checkpoints, step_of
from pipeline.training.checkpoint_files import Files
from pipeline.training.ema import Ema
from pipeline.training.engines import build_engine, device_errors_in_a_line
from pipeline.training.engines.base import Batch, Engine, Metrics, Start
from pipeline.training.profiler import Profiler
from pipeline.training.running_metrics import Reading, RunningMetrics
from pipeline.training.save_interval import SaveInterval
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.sharded_state import ShardedState, shards_file
from pipeline.training.state import State
from pipeline.training.stopping import EvaluationStopped, LookOut, stop_if_asked
from pipeline.training.throughput import Speedometer
from pipeline.training.workload import Workload

log = logging.getLogger(__name__)


def train(
    run: StageRun,
    training: TrainingConfig,
    workload: Workload,
    *,
    engine: Literal["accelerate", "deepspeed"],
    deepspeed: DeepSpeedConfig | None = None,
    initial: InitialValues | None = None,
) -> Path:
    """Train to the last step, resuming from the newest checkpoint if there is one; returns the result's checkpoint.

    That is the last one, or with `training.keep_best` the best one; `training/consolidate.py` reads it. On accelerate's
    engine `workload.objective` has the result, too: with `training.ema_decay` the averaged weights.

    Args:
        initial: of an objective that was built without memory, on deepspeed; drawn where there is no checkpoint.

    Raises:
        StoppedOnRequest: asked to stop; everything is in a checkpoint.
        UserError: too many non-finite steps in a row, or no usable checkpoint.
    """
    own_log = watchdog.rank_log(run.directory.parent / "logs", run.name, distributed.rank())
    with device_errors_in_a_line(training), watchdog.watching(training.hang_timeout_s, own_log):
        speed = Speedometer(training, workload, engine)
        start = Start(initial, drawn=not resumes(run)) if initial else None
        built = build_engine(engine, workload.objective, training, deepspeed, run.directory, start)
        if distributed.device().type == "cpu":
            malloc.keep_freed()
        return Trainer(run, training, workload, built, speed).run()


def resumes(run: StageRun) -> bool:
    """Collective: whether a checkpoint will be restored; where there are some and none is usable, restoring raises."""
    return distributed.broadcast_object(distributed.is_main() and bool(saved_steps(run.directory / "checkpoints")))


class Trainer:
    """One training: its engine, moving average, checkpoints and counters. All ranks run it in step."""

    def __init__(
        self, run: StageRun, training: TrainingConfig, workload: Workload, engine: Engine, speed: Speedometer
    ) -> None:
        self.stage = run
        self.training = training
        self.workload = workload
        self.engine = engine
        self.accumulation = accumulation_steps(training, distributed.world_size())
        self.ema = Ema(engine.local_parameters, training.ema_decay) if training.ema_decay else None
        self.checkpoints = Checkpoints(
            run.directory / "checkpoints",
            training.keep_checkpoints,
            training.keep_every,
            in_background=training.async_checkpoints,
        )
        self._interval = SaveInterval(training.checkpoint_every)
        self.state = State()
        self._running = RunningMetrics(training.max_nonfinite_steps)
        self._look_out = LookOut(training.stop_check_every)
        self._saved_step = -1
        self._has_stepped = False
        self._asked_to_stop = False
        self._logged: tuple[int, dict[str, float]] = (-1, {})  # step and content of the last line of training metrics
        self._speed = speed
        self._profiler = Profiler(training.profile, run.directory, run.tracker)

    def run(self) -> Path:
        """Train from the newest checkpoint to the last step. See `train`."""
        self._restore()
        training, state = self.training, self.state
        batches = self.workload.batches(state.step * training.batch_size)
        bar = progress(
            total=training.steps,
            initial=state.step,
            description=self.stage.name,
            unit="step",
            shown=distributed.is_main(),
        )
        self._speed.start(state.step)
        with closing(batches), bar:
            self._resume_evaluation()
            while not self._is_over():
                self._step(next(batches))
                bar.update()
                if state.step % training.log_every == 0 or state.step == training.steps:
                    bar.set_postfix_str(f"loss {self._look().loss:.4f}", refresh=False)
                    self._log()
                elif self._look_out.due(state.step):
                    self._look()
                self._at_intervals()
                self._stop_if_asked()
        self._profiler.finish()
        self._save()
        self.checkpoints.finish()
        result = result_checkpoint(state.best, training, self.checkpoints, self.stage.name, state.step)
        if result == self.checkpoints.path(state.step):
            self._take_average()
        else:
            self._load(result)
            self._take_average()
            self._show_result(step_of(result))
        return result

    def _take_average(self) -> None:
        if self.ema:
            self.ema.swap()
            self.engine.sync_parameters()

    def _is_over(self) -> bool:
        """Whether the last step is done, or no evaluation was the best for so long that there is to be none."""
        return self.state.step >= self.training.steps or self.state.best.gave_up(self.training.keep_best)

    def _step(self, batch: Batch) -> None:
        """One optimizer update. It waits for nothing on the device: what it found is there until the next look."""
        state = self.state
        watchdog.beat(f"step {state.step + 1}", patient=not self._has_stepped)  # the first one compiles
        self._has_stepped = True
        self._profiler.before_step(state.step)
        seed_step(self.stage.training_seed, state.step, distributed.rank())
        self.engine.objective.train()
        found = self._forward_and_backward(batch)
        update = self.engine.update(learning_rate_factor(self.training, state.step))
        self.engine.objective.after_update(update.applied)
        if self.ema:
            self.ema.update(update.applied)
        state.step += 1
        asked = signals.requested() is not None
        self._running.add(state.step, found, update, asked, self._look_out.step_s)

    def _forward_and_backward(self, batch: Batch) -> list[Metrics]:
        """Accumulate the gradients of this rank's samples of one step; returns each micro-batch's metrics."""
        size, step = next(iter(batch.values())).shape[0] // self.accumulation, self.state.step
        cut = {name: tensor.split(size) for name, tensor in batch.items()}
        parts = [{name: tensors[index] for name, tensors in cut.items()} for index in range(self.accumulation)]
        if len(parts) > 1:
            with torch.no_grad(), self.engine.autocast():
                self.engine.objective.look_ahead(parts, step)
        weight, last = 1 / self.accumulation, parts[-1]
        return [self.engine.accumulate(part, step, weight, last=part is last) for part in parts]

    def _look(self) -> Reading:
        """Wait for the device, and learn what all ranks know of the steps until now.

        Raises:
            UserError: as many steps in a row as are allowed were not finite.
        """
        state, reading = self.state, self._running.read()
        self._look_out.looked(state.step, reading.step_s)
        self._asked_to_stop |= reading.asked_to_stop
        self.checkpoints.poll()
        self._interval.looked()
        state.sums, state.count = reading.sums, reading.count
        if skipped := reading.nonfinite_steps - state.nonfinite_steps:
            log.warning(
                "step %d: skipped since the last look, as loss or gradient was not finite: %d (loss of the latest: %s)",
                state.step,
                skipped,
                reading.nonfinite_loss,
            )
        state.nonfinite_steps, state.nonfinite_in_a_row = reading.nonfinite_steps, reading.nonfinite_in_a_row
        if reading.gave_up_at:
            raise UserError(
                f"{self.stage.name}: expected finite gradients, found {self.training.max_nonfinite_steps} non-finite"
                f" steps in a row at step {reading.gave_up_at}: lower training.learning_rate, raise warmup_steps, or"
                " set precision=fp32"
            )
        return reading

    def _log(self) -> None:
        state = self.state
        means = {name: total / state.count for name, total in state.sums.items()}
        state.sums, state.count = {}, 0
        self._running.clear()
        means |= {
            "learning_rate": self.training.learning_rate * learning_rate_factor(self.training, state.step - 1),
            "nonfinite_steps": state.nonfinite_steps,
            **self.workload.data_metrics(state.step * self.training.batch_size),
        }
        self._logged = (state.step, means | self._speed.read(state.step))
        self.stage.tracker.log(self._logged[1], state.step)
        if distributed.is_main():
            self.engine.objective.report(state.step)

    def _at_intervals(self) -> None:
        """Evaluate, sample images and save, at the steps that the config names and after the last one."""
        step, training = self.state.step, self.training
        at_end = self._is_over()
        metrics = step % training.evaluate_every == 0 or at_end
        images = step % training.log_images_every == 0 or at_end
        if metrics or images:
            self._look()  # the time of the steps until now is not the evaluation's
            before = self.state.best
            try:
                self._evaluate(metrics, images)
            except EvaluationStopped:
                self.state.evaluation_stopped = self._logged[1] if self._logged[0] == step else {}
                self._asked_to_stop = True
                return
            if self.state.best != before:
                self._saved_step = -1  # a checkpoint from before this evaluation does not know of it
            if self._is_over() and self._logged[0] != step:  # this evaluation ended it
                self._log()
        is_best = metrics and self.state.best.step == step
        if (is_best or self._interval.due(step)) and not self._is_over():
            self._save()

    def _resume_evaluation(self) -> None:
        """Do again what a stop request ended: the evaluation after the last step, and what was logged at that step."""
        logged = self.state.evaluation_stopped
        if logged is None:
            return
        self.state.evaluation_stopped = None
        if logged:
            self._logged = (self.state.step, logged)
            self.stage.tracker.log(logged, self.state.step)
        self._at_intervals()
        self._stop_if_asked()

    @torch.no_grad()
    def _evaluate(self, metrics: bool, images: bool) -> None:
        """Log validation metrics and sample images, with the averaged weights if there are any.

        With `keep_best` it judges the metrics, and samples images where they end the training. It draws nothing from
        the training's random numbers.

        Raises:
            EvaluationStopped: a rank was asked to stop; the resumed training logs all of this step again.
        """
        watchdog.beat(f"the evaluation after step {self.state.step}")
        started = time.monotonic()
        objective, keep, best = self.engine.objective, self.training.keep_best, self.state.best
        objective.eval()
        seed_step(self.stage.config.seed, -1, distributed.rank())
        with self._averaged(), self.engine.autocast():
            stop_if_asked()
            if metrics:
                found = self.workload.evaluate(self.engine.model)
                stop_if_asked()
                if keep:
                    best = best.after(keep, found, self.state.step)
                    found = found | best.metrics(keep)
                self.stage.tracker.log(found, self.state.step)
            if images or best.gave_up(keep):
                self._sample_images(self.state.step)
        self.state.best = best
        self._speed.leave_out(time.monotonic() - started)

    def _sample_images(self, step: int) -> None:
        """Log images of the weights that the model has now, which are those of `step`."""
        watchdog.beat(f"the images after step {step}", patient=True)
        with self.engine.gathered_outside_blocks():
            shown = self.workload.sample_images(self.engine.objective, self.engine.in_step)
        if distributed.is_main():
            for name, image in shown.items():
                self.stage.tracker.log_image(name, image, step)

    @torch.no_grad()
    def _show_result(self, step: int) -> None:
        """Log images of the result where that is not the last step's: its evaluation may have sampled none.

        Raises:
            StoppedOnRequest: a rank was asked to stop; the resumed training samples them.
        """
        self.engine.objective.eval()
        seed_step(self.stage.config.seed, -1, distributed.rank())
        try:
            with self.engine.autocast():
                self._sample_images(step)
        except EvaluationStopped as stopped:
            raise StoppedOnRequest(f"{self.stage.name}: stopped before the images of step {step}") from stopped

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        if self.ema is None:
            yield
            return
        self.ema.swap()
        self.engine.sync_parameters()
        try:
            yield
        finally:
            self.ema.swap()
            self.engine.sync_parameters()

    def _stop_if_asked(self) -> None:
        """Save and end: all ranks at the same step, whichever of them got the signal."""
        if not self._asked_to_stop:
            return
        asked = signals.describe(distributed.all_gather_objects(signals.requested()))
        self._save()
        self.checkpoints.finish()
        raise StoppedOnRequest(f"{self.stage.name}: stopped at step {self.state.step}/{self.training.steps}: {asked}")

    def _save(self) -> None:
        if self._saved_step != self.state.step:
            self._look()
            watchdog.beat(f"the checkpoint after step {self.state.step}", patient=True)
            started = time.monotonic()
            best = self.state.best.step if self.training.keep_best else 0
            self.checkpoints.save(self.state.step, self._files(), best or None)
            self._saved_step = self.state.step
            self._interval.saved()
            self._speed.leave_out(time.monotonic() - started)

    def _files(self) -> Files:
        """This rank's files of a checkpoint; their table is in `checkpoint.py`."""
        training, at_end = self.training, self._is_over()
        if at_end and not training.keep_optimizer:
            self.checkpoints.keep = 1  # nothing is resumed from those of before
        has_optimizer = training.keep_optimizer or not at_end
        files = self.engine.checkpoint_files(has_optimizer)
        if self.ema:
            files |= [shards_file("ema", self.engine.local_shards(self.ema.average))]
        if distributed.is_main():
            files["trainer.json"] = asdict(self.state) | {"has_optimizer": has_optimizer}
            if exported := self.engine.objective.exported():
                files["model.json"] = vars(exported)
        return files

    def _restore(self) -> None:
        watchdog.beat("reading the checkpoint", patient=True)
        step = self.checkpoints.restore(self._read)
        self.state.best = still_there(self.state.best, self.checkpoints, self.stage.name, self.state.step)
        if distributed.is_main():
            # A process killed in an evaluation that it did again has logged it, or part of it, at this very step.
            again = self.state.evaluation_stopped is not None
            self.stage.tracker.truncate(self.state.step - again)
            if step is not None:
                log.info("%s: resuming from step %d", self.stage.name, step)
        self._saved_step = -1 if step is None else step

    def _read(self, directory: Path) -> None:
        self._load(directory)
        self.state = state = State.read(directory / "trainer.json")
        self._running.start(state.sums, state.count, state.nonfinite_steps, state.nonfinite_in_a_row)
        if self.ema:
            self.ema.updates = state.step - state.nonfinite_steps
        if not state.has_optimizer and not self._is_over() and distributed.is_main():
            log.warning(
                "%s: the checkpoint of step %d has no optimizer states (keep_optimizer: false): they begin anew",
                self.stage.name,
                state.step,
            )

    def _load(self, directory: Path) -> None:
        self.engine.load(directory)
        if self.ema:
            self.engine.read_shards(self.ema.average, ShardedState(directory, "ema"))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators for one step of one rank, so that no generator state needs saving."""
    torch.manual_seed(int(digest([seed, step, rank])[:16], 16) & (2**63 - 1))
