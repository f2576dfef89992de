"""Both engines train as plain PyTorch does, whatever the ZeRO stage, accumulation and number of processes.

Every training runs for real, on one process or two; each set of processes is started once and goes through its list.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.config.base import parse_config
from pipeline.config.training import DeepSpeedConfig, TrainingConfig, accumulation_steps
from pipeline.core.errors import UserError
from pipeline.core.weights import weight_files
from pipeline.training.consolidate import consolidate
from pipeline.training.engines import build_engine
from pipeline.training.optimizer import build_adamw, set_learning_rates
from pipeline.training.schedule import learning_rate_factor
from tests.conftest import made_once
from tests.launch import launch
from tests.training.engine_worker import BATCH, STEPS, Case, SmallObjective, global_batch, started, training

ZERO, POISONED, HALF = (0, 1, 2, 3), 3, STEPS // 2
ORDERS = [Case(zero=zero, order=order) for zero in ZERO for order in ("any", "scale")]
RESUMED = [
    *(Case(zero=zero) for zero in ZERO),
    *(case for case in ORDERS if case.zero == 3),
    *(Case(zero=zero, optimizer="muon") for zero in ZERO),
    Case(kind="accelerate", zero=0, optimizer="muon"),
    *(Case(zero=zero, precision="bf16-weights", average=True) for zero in (1, 2, 3)),
]

PARITY = [
    *(Case(zero=zero, accumulation=accumulation) for zero in ZERO for accumulation in (1, 2)),
    *(Case(kind="accelerate", zero=0, accumulation=accumulation) for accumulation in (1, 2)),
    *(Case(zero=zero, overlap=True) for zero in (1, 2, 3)),
    *(Case(zero=zero, offload=True, accumulation=2) for zero in (1, 2, 3)),
]
MUON = [*(Case(zero=zero, optimizer="muon") for zero in ZERO), Case(kind="accelerate", zero=0, optimizer="muon")]
POISON = [Case(zero=zero, poisoned_step=POISONED) for zero in ZERO] + [
    Case(zero=1, optimizer="muon", poisoned_step=POISONED),
    Case(zero=3, optimizer="muon", poisoned_step=POISONED),
    Case(kind="accelerate", zero=0, optimizer="muon", poisoned_step=POISONED),
    Case(kind="accelerate", zero=0, poisoned_step=POISONED),
]
BEGINNINGS = [Case(zero=zero, without_memory=True, last_step=0) for zero in ZERO]
BEGINNINGS += [Case(zero=3, precision="bf16-weights", average=True, without_memory=True)]
RECOMPUTED, DROPPED = ([Case(zero=zero, recompute=on, dropout=not on) for zero in (0, 3)] for on in (True, False))
BF16_WEIGHTS = [
    *(Case(zero=zero, precision="bf16-weights", poisoned_step=POISONED) for zero in (1, 2, 3)),
    *(Case(zero=zero, precision="bf16-weights", offload=True, poisoned_step=POISONED) for zero in (1, 2, 3)),
]
AVERAGED = [
    *(Case(zero=zero, average=True) for zero in ZERO),
    *(Case(zero=zero, average=True, precision="bf16-weights") for zero in (1, 2, 3)),
]
CONSOLIDATED = [*AVERAGED, Case(kind="accelerate", zero=0, average=True)]
WAITS_FOR_NOTHING = [
    *(Case(kind="accelerate", zero=0, optimizer=own, average=True, may_wait=False) for own in ("adamw", "muon")),
    Case(zero=0, average=True, may_wait=False),
    *(Case(zero=zero, average=True, precision="bf16-weights", accumulation=2, may_wait=False) for zero in (1, 2)),
]
WAITS = Case(zero=3, precision="bf16-weights", may_wait=False)
BF16 = [Case(zero=zero, precision="bf16-autocast", poisoned_step=POISONED) for zero in ZERO]  # last: it is global


def _first_half(case: Case, processes: int) -> Case:
    return dataclasses.replace(case, last_step=HALF, save=f"{case.name} of {processes}")


def _second_half(case: Case, by: int, zero: int | None = None) -> Case:
    """A training that resumes what `by` processes saved, maybe at another stage."""
    zero = case.zero if zero is None else zero
    return dataclasses.replace(case, zero=zero, first_step=HALF, load=f"{case.name} of {by}")


# Saved by the one, resumed by the other, and the reverse; and the stages in a circle.
BY_ONE = [_first_half(case, 1) for case in RESUMED]
BY_TWO = [_first_half(case, 2) for case in RESUMED]
BY_TWO_AFTER_ONE = [_second_half(case, by=1) for case in RESUMED]
BY_ONE_AFTER_TWO = [_second_half(case, by=2) for case in RESUMED]
BY_TWO_AFTER_TWO = [_second_half(case, by=2) for case in RESUMED]
WITHOUT_MEMORY = [
    dataclasses.replace(case, without_memory=True) for case in BY_TWO_AFTER_TWO if case.kind == "deepspeed"
]
OTHER_STAGE = [_second_half(case, by=2, zero=(case.zero + 1) % 4) for case in RESUMED[:4]]
OTHER_STAGE += [_second_half(case, by=2, zero=case.zero % 3 + 1) for case in RESUMED[-3:]]
# Saved by one process and at once read by two at another stage: what is not trained in between must be the same bits.
ONLY_READ = [
    dataclasses.replace(case, first_step=HALF, last_step=HALF, load=f"{case.name} of 1", zero=case.zero % 3 + 1)
    for case in RESUMED[-3:]
]

Results = dict[str, dict[str, Any]]


def _train(cases: list[Case], folder: Path, processes: int) -> Results:
    launch("tests.training.engine_worker", json.dumps([vars(case) for case in cases]), str(folder), processes=processes)
    found: Results = torch.load(folder / "results.pt")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the trainings save, and their results by number of processes: trained once for all of pytest's workers."""

    def make(folder: Path) -> None:
        everywhere = BEGINNINGS + PARITY + ORDERS + MUON + POISON + BF16_WEIGHTS + CONSOLIDATED
        one = _train([*everywhere, *RECOMPUTED, *DROPPED, *BY_ONE, *WAITS_FOR_NOTHING, WAITS, *BF16], folder, 1)
        two = [*everywhere, *BY_TWO, *BY_TWO_AFTER_ONE, *BY_TWO_AFTER_TWO, *WITHOUT_MEMORY, *ONLY_READ, *BF16]
        by_two = _train(two, folder, 2)
        one |= _train([*BY_ONE_AFTER_TWO, *OTHER_STAGE], folder, 1)
        torch.save({1: one, 2: by_two}, folder / "trained.pt")

    return made_once(tmp_path_factory, "engines", make)


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[int, Results]:
    """Results by number of processes and name of the case."""
    found: dict[int, Results] = torch.load(folder / "trained.pt")
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_initial_weights_are_the_same_bits_at_every_stage_and_number_of_processes(
    trained: dict[int, Results], processes: int
) -> None:
    drawn = dict(started(Case()).named_parameters())
    for case in BEGINNINGS[:4]:
        _expect_same_bits(trained[processes][case.name]["weights"], drawn)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_model_built_without_memory_trains_to_the_same_bits(trained: dict[int, Results], processes: int) -> None:
    built, whole = BEGINNINGS[-1], dataclasses.replace(BEGINNINGS[-1], without_memory=False)
    _expect_same_bits(trained[processes][built.name]["weights"], trained[processes][whole.name]["weights"])


@pytest.mark.parametrize("case", WITHOUT_MEMORY, ids=lambda case: case.name)
@pytest.mark.slow
def test_a_resumed_training_draws_no_weights_for_the_same_bits(trained: dict[int, Results], case: Case) -> None:
    drawn = dataclasses.replace(case, without_memory=False)
    _expect_same_bits(trained[2][case.name]["weights"], trained[2][drawn.name]["weights"])


def _expect_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def _plain_pytorch(skipped_step: int | None = None, order: str | None = None) -> tuple[dict[str, Tensor], list[float]]:
    config = training(Case(), 1)
    objective = started(Case(order=order))
    optimizer = build_adamw(objective.parameter_groups(), config)
    norms = []
    for step in range(STEPS):
        if step != skipped_step:
            set_learning_rates(optimizer, learning_rate_factor(config, step))
            objective(global_batch(step, order=order), step)[0].backward()
            norms.append(torch.nn.utils.clip_grad_norm_(objective.parameters(), config.gradient_clipping).item())
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in objective.named_parameters()}, norms


def _plain_average() -> dict[str, Tensor]:
    """Of the weights of a training in plain PyTorch, with decay 0.8."""
    config = training(Case(), 1)
    objective = started(Case())
    optimizer = build_adamw(objective.parameter_groups(), config)
    average = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    for step in range(STEPS):
        set_learning_rates(optimizer, learning_rate_factor(config, step))
        objective(global_batch(step), step)[0].backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.8, (2 + step) / (11 + step))
        for name, parameter in objective.named_parameters():
            average[name].mul_(decay).add_(parameter.detach(), alpha=1 - decay)
    return average


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", PARITY + ORDERS, ids=lambda case: case.name)
@pytest.mark.slow
def test_an_engine_equals_plain_pytorch(case: Case, processes: int, trained: dict[int, Results]) -> None:
    found = trained[processes][case.name]
    weights, norms = _plain_pytorch(order=case.order)
    # Adam magnifies the rounding of small gradients, of which a transformer has some.
    torch.testing.assert_close(found["weights"], weights, rtol=1e-5, atol=1e-5 if case.order else 1e-6)
    assert found["norms"] == pytest.approx(norms, rel=1e-4)
    assert all(found["applied"])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", MUON, ids=lambda case: case.name)
@pytest.mark.slow
def test_muon_equals_torchs_muon(case: Case, processes: int, trained: dict[int, Results]) -> None:
    config = training(case, 1)
    objective = started(Case())
    matrices = [p for name, p in objective.named_parameters() if p.ndim == 2 and "layers." in name]
    others = [p for p in objective.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
    adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=config.betas, weight_decay=0.0)
    for step in range(STEPS):
        muon.param_groups[0]["lr"] = config.muon_learning_rate * learning_rate_factor(config, step)
        adamw.param_groups[0]["lr"] = config.learning_rate * learning_rate_factor(config, step)
        objective(global_batch(step), step)[0].backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    # Both orthogonalise in bfloat16, whose 8 bits depend on the order of operations.
    weights = {name: parameter.detach() for name, parameter in objective.named_parameters()}
    assert _distance(trained[processes][case.name]["weights"], weights) < 0.01


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference / norm of what was expected."""
    pairs = [(found[name] - value, value) for name, value in expected.items()]
    off, all_expected = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*pairs, strict=True))
    return float(off.norm() / all_expected.norm())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", POISON + BF16_WEIGHTS + BF16, ids=lambda case: case.name)
@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_process_is_applied_on_none(
    case: Case, processes: int, trained: dict[int, Results]
) -> None:
    found = trained[processes][case.name]
    assert [step for step, applied in enumerate(found["applied"]) if not applied] == [POISONED]
    assert all(torch.isfinite(weight).all() for weight in found["weights"].values())
    if case.optimizer == "adamw":
        expected = _plain_pytorch(skipped_step=POISONED)[0]
        assert _distance(found["weights"], expected) < (1e-6 if case.precision == "fp32" else 0.02)


@pytest.mark.parametrize("case", WAITS_FOR_NOTHING, ids=lambda case: case.name)
@pytest.mark.slow
def test_a_step_waits_for_nothing_on_the_device(case: Case, trained: dict[int, Results]) -> None:
    assert "error" not in trained[1][case.name], trained[1][case.name]["error"]
    assert all(trained[1][case.name]["applied"])


@pytest.mark.slow
def test_a_step_of_zero_3_waits_for_deepspeeds_norm_of_gradients(trained: dict[int, Results]) -> None:
    assert "makes the host wait for a value" in trained[1][WAITS.name]["error"]


@pytest.mark.parametrize("case", RECOMPUTED, ids=lambda case: case.name)
@pytest.mark.slow
def test_activation_checkpointing_changes_no_bit(case: Case, trained: dict[int, Results]) -> None:
    kept = dataclasses.replace(case, recompute=False, dropout=True)
    assert all(trained[1][case.name]["applied"])
    _expect_same_bits(trained[1][case.name]["weights"], trained[1][kept.name]["weights"])  # of dropout, too


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        *((case, 2) for case in BY_TWO_AFTER_ONE),
        *((case, 1) for case in BY_ONE_AFTER_TWO),
        *((case, 2) for case in BY_TWO_AFTER_TWO),
        *((case, 1) for case in OTHER_STAGE),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else f"{value} processes",
)
@pytest.mark.slow
def test_a_training_resumes_at_another_number_of_processes_and_another_stage(
    case: Case, processes: int, trained: dict[int, Results]
) -> None:
    whole = dataclasses.replace(case, first_step=0, load=None)
    undisturbed = trained[processes][whole.name] if processes == 2 else None
    if undisturbed and case.load and case.load.endswith("of 2"):  # as if nothing had happened
        torch.testing.assert_close(trained[2][case.name]["weights"], undisturbed["weights"], rtol=0, atol=0)
        return
    # Sums of gradients in bf16 have 8 bits, in another order others.
    tolerance = 0.01 if case.optimizer == "muon" or case.precision != "fp32" else 1e-6
    assert _distance(trained[processes][case.name]["weights"], trained[1][whole.name]["weights"]) < tolerance


@pytest.mark.parametrize("case", ONLY_READ, ids=lambda case: case.name)
@pytest.mark.slow
def test_what_one_process_saved_two_read_at_another_stage_bit_by_bit(case: Case, trained: dict[int, Results]) -> None:
    saved = trained[1][next(by_one.name for by_one in BY_ONE if by_one.save == case.load)]["weights"]
    torch.testing.assert_close(trained[2][case.name]["weights"], saved, rtol=0, atol=0)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", BF16_WEIGHTS, ids=lambda case: case.name)
@pytest.mark.slow
def test_with_bf16_weights_the_model_is_bf16_and_what_is_left_at_the_end_float32(
    case: Case, processes: int, trained: dict[int, Results]
) -> None:
    found = trained[processes][case.name]
    assert found["dtypes"] == {torch.bfloat16}
    assert {weight.dtype for weight in found["weights"].values()} == {torch.float32}
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in found["weights"].values())


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", AVERAGED, ids=lambda case: case.name)
@pytest.mark.slow
def test_the_average_is_that_of_the_float32_weights_and_lies_on_the_optimizers_slice(
    case: Case, processes: int, trained: dict[int, Results]
) -> None:
    found = trained[processes][case.name]
    average, parameters = _plain_average(), sum(p.numel() for p in SmallObjective().parameters())
    assert _distance(found["weights"], average) < (1e-6 if case.precision == "fp32" else 0.01)
    on_one = parameters / (processes if case.zero else 1)
    assert found["averaged"] == pytest.approx(on_one, abs=20)  # slices are cut at multiples of a few elements


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CONSOLIDATED, ids=lambda case: case.name)
@pytest.mark.slow
def test_a_consolidated_checkpoint_has_the_gathered_weights_bit_for_bit(
    case: Case, processes: int, trained: dict[int, Results], folder: Path, tmp_path: Path
) -> None:
    _expect_gathered(trained[processes][case.name], folder / f"{case.name} at the end of {processes}", tmp_path)


@pytest.mark.slow
def test_four_processes_start_with_the_same_bits_and_consolidate_to_the_gathered_weights(tmp_path: Path) -> None:
    found = _train([*BEGINNINGS[:4], *AVERAGED[:4]], tmp_path, 4)
    drawn = dict(started(Case()).named_parameters())
    for case in BEGINNINGS[:4]:
        _expect_same_bits(found[case.name]["weights"], drawn)
    for case in AVERAGED[:4]:
        _expect_gathered(found[case.name], tmp_path / f"{case.name} at the end of 4", tmp_path / "model")


def _expect_gathered(found: dict[str, Any], checkpoint: Path, model: Path) -> None:
    for averaged, weights in ((None, found["weights"]), (False, found["not averaged"])):
        assert consolidate(checkpoint, model, averaged, shard_bytes=800) == (averaged is None)
        files = weight_files(model)
        assert len(files) > 2
        consolidated = {name: value for file in files for name, value in load_file(model / file).items()}
        assert consolidated.keys() == weights.keys()
        assert all(torch.equal(consolidated[name], weights[name]) for name in weights)
    assert not torch.equal(found["weights"]["head.weight"], found["not averaged"]["head.weight"])


def test_a_batch_that_micro_batches_do_not_divide_is_refused() -> None:
    config = TrainingConfig(steps=10, warmup_steps=0, batch_size=12, micro_batch_size=6)
    assert accumulation_steps(config, processes=1) == 2
    assert accumulation_steps(config, processes=2) == 1
    with pytest.raises(UserError, match="a multiple of 3 processes × micro_batch_size 6, found 12"):
        accumulation_steps(config, processes=3)
    with pytest.raises(UserError, match="a multiple of 5 processes, found 12"):
        accumulation_steps(config.model_copy(update={"micro_batch_size": None}), processes=5)


def test_a_config_whose_micro_batches_do_not_divide_its_batch_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"batch_size to be a multiple of .*micro_batch_size 5, found 12"):
        parse_config(TrainingConfig, {"steps": 10, "warmup_steps": 0, "batch_size": 12, "micro_batch_size": 5}, "test")


@pytest.mark.machine
def test_fp16_on_cpu_is_refused_with_what_to_do(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("fp16 trains on a GPU")
    config = TrainingConfig(steps=10, warmup_steps=0, batch_size=BATCH, precision="fp16")
    with pytest.raises(UserError, match="found fp16: set training.precision=bf16"):
        build_engine("accelerate", SmallObjective(), config, None, tmp_path)


class WithoutBlocks(SmallObjective):
    def blocks(self) -> list[nn.Module]:
        return []


def test_activation_checkpointing_without_blocks_is_refused(tmp_path: Path) -> None:
    config = TrainingConfig(steps=10, warmup_steps=0, batch_size=BATCH, activation_checkpointing=True)
    with pytest.raises(UserError, match="block needs a model with blocks, found none: set it to none"):
        build_engine("accelerate", WithoutBlocks(), config, None, tmp_path)


def test_one_process_spreads_nothing_unless_it_must() -> None:
    assert [DeepSpeedConfig().stage(processes, "bf16-autocast") for processes in (1, 2)] == [0, 1]
    assert DeepSpeedConfig().stage(1, "fp16") == DeepSpeedConfig().stage(1, "bf16-weights") == 1
    assert DeepSpeedConfig(offload_optimizer=True).stage(1, "bf16-autocast") == 1
    assert DeepSpeedConfig(zero_stage=2).stage(1, "bf16-autocast") == 2


def test_offload_without_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="set zero_stage to 1, 2 or 3"):
        DeepSpeedConfig(zero_stage=0, offload_optimizer=True)
