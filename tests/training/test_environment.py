"""The environment decides no result: what libraries read there is pinned or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.core.environment import refuse_what_decides_results
from pipeline.core.errors import UserError
from pipeline.training.engines import build_engine
from tests.launch import launch
from tests.training.engine_worker import Case, SmallObjective, training


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_CPU", "1"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("NVIDIA_TF32_OVERRIDE", "1"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
    ],
)
def test_a_variable_that_would_change_results_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"found {name}={value} in the environment"):
        refuse_what_decides_results({name: value})


def test_what_accelerate_launch_leaves_is_harmless() -> None:
    harmless = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    refuse_what_decides_results(harmless | {"ACCELERATE_USE_CPU": "false", "NVIDIA_TF32_OVERRIDE": "0"})


@pytest.mark.slow  # a process that imports accelerate
def test_what_accelerate_reads_changes_no_weight() -> None:
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_CLIPPING": "0.001",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1",
    }
    plain, other = (launch("tests.training.environment_worker", **extra) for extra in ({}, variables))
    assert "weights" in plain
    assert plain == other


def test_torchs_matrix_products_are_in_full_precision(tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("high")
    build_engine("accelerate", SmallObjective(), training(Case(), 1), None, tmp_path)
    assert torch.get_float32_matmul_precision() == "highest"
