"""What a precision means on a device, and how a GPU computes: without a GPU, by what torch says of one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate.state import AcceleratorState

from pipeline.config.training import DeepSpeedConfig, TrainingConfig, resolved_precision
from pipeline.core.arithmetic import prepare_determinism, set_arithmetic
from pipeline.core.errors import UserError
from pipeline.training.checkpoint_files import write_files
from pipeline.training.engines import build_engine, device_errors_in_a_line
from pipeline.training.engines.deepspeed import clips_itself, deepspeed_settings
from pipeline.training.throughput import Speedometer
from tests.dtypes import Dtypes
from tests.launch import launch
from tests.training.engine_worker import BATCH, SmallObjective, global_batch
from tests.training.test_trainer import SmallWorkload

CONFIG = TrainingConfig(steps=10, warmup_steps=0, batch_size=BATCH)


def _with(**changes: object) -> TrainingConfig:
    return CONFIG.model_copy(update=changes)


def test_bf16_is_bf16_weights_where_a_gpu_and_zero_are_and_autocast_elsewhere() -> None:
    assert resolved_precision("bf16", on_gpu=True, engine="deepspeed") == "bf16-weights"
    assert resolved_precision("bf16", on_gpu=True, engine="accelerate") == "bf16-autocast"
    assert resolved_precision("bf16", on_gpu=False, engine="deepspeed") == "bf16-autocast"
    assert resolved_precision("bf16-autocast", on_gpu=True, engine="deepspeed") == "bf16-autocast"
    assert resolved_precision("fp32", on_gpu=True, engine="deepspeed") == "fp32"


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("engine", ["accelerate", "deepspeed"])
def test_bf16_is_float32_on_a_cpu_without_it(
    engine: Literal["accelerate", "deepspeed"],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    seen: set[torch.dtype] = set()
    objective = SmallObjective()
    objective.head.register_forward_hook(lambda module, x, y: seen.add(y.dtype))
    with caplog.at_level(logging.INFO):
        built = build_engine(engine, objective, _with(precision="bf16"), None, tmp_path)
    built.accumulate(global_batch(0), 0, 1.0, True)
    assert seen == {torch.float32}
    assert caplog.text.count("precision bf16 is fp32 here: a CPU has no products in bf16") == 1


@pytest.mark.usefixtures("accelerator")
def test_autocast_that_is_asked_for_on_a_cpu_without_bf16_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    build_engine("accelerate", SmallObjective(), _with(precision="bf16-autocast"), None, tmp_path)
    assert caplog.text.count("set training.precision=bf16, which is float32 there") == 1


def test_utilisation_is_of_products_in_the_precision_that_the_cpu_trains_in(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def rate(precision: str, device: torch.device) -> float:
        measured.append(precision)
        return 1e9

    monkeypatch.setattr("pipeline.training.throughput.matmul_flops_per_s", rate)
    for supported in (False, True):
        monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda supported=supported: supported)
        Speedometer(CONFIG, SmallWorkload(), "accelerate").start(0)
    assert measured == ["fp32", "bf16-autocast"]


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize("kind", ["accelerate", "deepspeed"])
def test_muon_resumed_on_a_cpu_without_bf16_computes_in_float32_there(
    kind: Literal["accelerate", "deepspeed"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for supported in (True, False):
        for name in ("bf16", "fp16"):  # no x86 has the second without the first
            monkeypatch.setattr(f"torch.ops.mkldnn._is_mkldnn_{name}_supported", lambda supported=supported: supported)
        engine = build_engine(kind, SmallObjective(), _with(optimizer="muon", precision="fp32"), None, tmp_path)
        if not supported:
            engine.load(tmp_path)
        with Dtypes("cpu") as dtypes:
            engine.accumulate(global_batch(0), 0, 1.0, True)
            engine.update(1.0)
        seen.append(any(torch.bfloat16 in of_one for of_one in dtypes.found.values()))
        write_files(tmp_path, engine.checkpoint_files())
    assert seen == [True, False]


def test_processes_on_unlike_cpus_compute_in_one_precision() -> None:
    assert launch("tests.training.precision_worker", processes=2).count("computes in fp32") == 2


@pytest.mark.parametrize(
    ("precision", "bf16", "autocast", "stage_of_one"),
    [("bf16-weights", True, False, 1), ("bf16-autocast", False, True, 0), ("fp32", False, False, 0)],
)
def test_deepspeed_is_told_the_precision(precision: str, bf16: bool, autocast: bool, stage_of_one: int) -> None:
    settings = deepspeed_settings(_with(precision=precision), DeepSpeedConfig(), 1, 100)
    assert ("bf16" in settings, "torch_autocast" in settings) == (bf16, autocast)
    assert settings["zero_optimization"]["stage"] == stage_of_one  # type: ignore[index]


def test_communication_overlaps_as_deepspeed_has_it_on_gpus_and_never_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlap(**config: object) -> object:
        zero = deepspeed_settings(CONFIG, DeepSpeedConfig.model_validate(config), 1, 100)["zero_optimization"]
        assert isinstance(zero, dict)
        return zero.get("overlap_comm")

    assert overlap(zero_stage=3) is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert overlap(zero_stage=3) is None  # which DeepSpeed makes true at stage 3
    assert overlap(zero_stage=3, overlap_communication=False) is False


def test_on_a_gpu_steps_without_fp16_offload_or_muon_wait_for_no_norm_up_to_stage_2() -> None:
    bf16 = _with(precision="bf16-weights")
    assert [clips_itself(bf16, DeepSpeedConfig(), stage) for stage in range(4)] == [True, True, True, False]
    assert not clips_itself(_with(precision="fp16"), DeepSpeedConfig(), 1)
    assert not clips_itself(_with(optimizer="muon"), DeepSpeedConfig(), 1)
    assert not clips_itself(bf16, DeepSpeedConfig(offload_optimizer=True), 1)


@pytest.mark.parametrize(
    ("engine", "precision", "message"),
    [
        ("accelerate", "bf16-weights", "found bf16-weights, which is the transformer's: set training.precision=bf16"),
        ("accelerate", "bf16", "found Tesla V100: set training.precision=fp16 or fp32"),
        ("deepspeed", "bf16-autocast", "found Tesla V100: set training.precision=fp16 or fp32"),
    ],
)
def test_a_precision_that_device_or_engine_has_not_is_one_line(
    engine: str, precision: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "V100" in message:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(UserError, match=message) as told:
        build_engine(engine, SmallObjective(), _with(precision=precision), None, tmp_path)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)


def test_master_weights_need_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are in ZeRO's optimizer, found 0: set 1, or training.precision=fp32"):
        build_engine(
            "deepspeed", SmallObjective(), _with(precision="bf16-weights"), DeepSpeedConfig(zero_stage=0), tmp_path
        )


@pytest.fixture
def arithmetic_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    set_arithmetic(tf32=False, deterministic=False)


@pytest.mark.usefixtures("arithmetic_as_before")
def test_deterministic_turns_on_what_torch_has_and_tells_in_a_line_of_what_it_cannot() -> None:
    set_arithmetic(tf32=False, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    in_a_line = pytest.raises(UserError, match=r"put_.*has none on this device: set training.deterministic=false")
    with in_a_line as told, device_errors_in_a_line(CONFIG):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert "\n" not in str(told.value)


@pytest.mark.usefixtures("arithmetic_as_before")
def test_deterministic_refuses_an_environment_that_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match="found :0:0 in the environment: unset it"):
        prepare_determinism()


def test_tf32_is_off_unless_it_is_asked_for() -> None:
    set_arithmetic(tf32=False, deterministic=False)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    set_arithmetic(tf32=True, deterministic=False)
    assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"  # on a CPU "high" would be other arithmetic
    set_arithmetic(tf32=False, deterministic=False)


def test_a_batch_that_does_not_fit_says_a_smaller_one() -> None:
    with (
        pytest.raises(
            UserError, match=r"with 8 samples a pass.*Tried to allocate 2 GiB\): set .*micro_batch_size=4, or"
        ),
        device_errors_in_a_line(CONFIG),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")


@pytest.fixture
def accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process, of the precision that came first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerator")
def test_an_optimizer_of_another_version_is_one_line(tmp_path: Path) -> None:
    engine = build_engine("accelerate", SmallObjective(), CONFIG, None, tmp_path)
    write_files(tmp_path, engine.checkpoint_files())
    state = torch.load(tmp_path / "training.pt", weights_only=True)
    state["optimizer"]["param_groups"].append(state["optimizer"]["param_groups"][0])
    torch.save(state, tmp_path / "training.pt")
    with pytest.raises(UserError, match="has the optimizer of another version .* to start over"):
        engine.load(tmp_path)
