"""`smalti plan` says before a training what is found in it."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.plan_memory import MODELS, measured, planned
from pipeline.config.pipeline import load_pipeline
from pipeline.training.optimizer import muon_matrices
from pipeline.training.resource_plan import checkpoint_bytes, count, duration
from pipeline.transformer.model import Transformer
from pipeline.transformer.objective import JointObjective
from tests.conftest import TINY
from tests.launch import ROOT, launch

DALLE = ROOT / "configs" / "dalle-12b.yaml"


@pytest.fixture(scope="module")
def dalle() -> str:
    return launch("pipeline", "plan", str(DALLE), "--gpu", "V100-16GB", "--gpus", "1024", "--time-limit", "1-00:00:00")


@pytest.mark.parametrize(
    "published",
    [  # Ramesh et al. 2021, section 2.2, section 2.4, appendix B
        "64 layers, width 3,968, 62 heads of 64",
        "256 text tokens of 16,384, then 1,024 codes (32×32 of 8,192): 1,280",
        "430,000 steps of 1,024 samples: 440.3 M samples, 563.6 G tokens",
        "on 1,024 × V100-16GB",
    ],
)
def test_plan_prints_the_published_numbers_of_dalle(published: str, dalle: str) -> None:
    assert published in dalle


def test_dalle_has_12_billion_parameters_in_24_gb_and_trains_on_its_gpus_with_zero_3_alone(dalle: str) -> None:
    found = re.search(r"parameters +([\d.]+) G; ([\d.]+) GB in 16 bits", dalle)
    assert found
    assert float(found[1]) == pytest.approx(12, rel=0.03)
    assert float(found[2]) == pytest.approx(24, rel=0.03)
    too_much = [line.split()[-6:] for line in dalle.splitlines() if "more than 16 GB" in line]
    assert len(too_much) == 3
    assert re.search(r"^\* 3 .* GB$", dalle, re.MULTILINE)


def test_parameters_and_tokens_are_those_of_the_trained_model(tiny_run: Path) -> None:
    model = count(load_pipeline(tiny_run / "config.yaml"), gpus=1)
    trained = Transformer.from_pretrained(tiny_run / "transformer" / "model")
    assert model.parameters == sum(parameter.numel() for parameter in trained.parameters())
    assert model.layout == trained.layout


def test_flops_a_token_are_six_a_weight_and_attention() -> None:
    config = load_pipeline(TINY, ["transformer.width=256", "transformer.heads=4", "transformer.layers=6"])
    model = count(config, gpus=1)
    with torch.device("meta"):
        transformer = Transformer(model.layout, config.transformer)
    blocks = sum(p.numel() for name, p in transformer.named_parameters() if "blocks" in name and p.ndim == 2)
    length, width, layers = model.layout.length, 256, 6
    text, image = model.layout.text_length / length, model.layout.image_length / length
    head = width * (text * model.layout.text_vocab_size + image * model.layout.levels[0].codebook_size)
    expected = 6 * (blocks + head) + 12 * layers * width * length
    assert model.flops_per_token == pytest.approx(expected, rel=0.01)


def test_with_muon_a_checkpoint_has_one_state_of_each_matrix_that_muon_trains() -> None:
    config = load_pipeline(TINY, ["transformer.width=64", "transformer.heads=4", "transformer.layers=2"])
    model, training = count(config, gpus=1), config.transformer.training
    with torch.device("meta"):
        objective = JointObjective(Transformer(model.layout, config.transformer), config.transformer)
    matrices = sum(matrix.numel() for matrix in muon_matrices(objective))
    assert 0 < matrices < model.parameters
    muon = training.model_copy(update={"optimizer": "muon"})
    assert checkpoint_bytes(model, training) - checkpoint_bytes(model, muon) == 4 * matrices


def test_requeues_are_those_of_jobs_that_stop_before_their_limit() -> None:
    config = load_pipeline(TINY)
    model, training = count(config, gpus=1), config.transformer.training
    tokens = training.steps * training.batch_size * model.layout.length
    rate = model.flops_per_token * tokens / 10_000  # of 10,000 s of work
    assert duration(model, training, 1, rate, limit_s=360 + 10_000).requeues == 0
    assert duration(model, training, 1, rate, limit_s=360 + 2_500).requeues == 3
    assert duration(model, training, 1, rate, limit_s=360 + 2_400).requeues == 4


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--gpu", "H1000"), "--gpu H1000: expected one of"),
        (("--time-limit", "a day"), "expected HH:MM:SS"),
        (("--time-limit", "00:05:00"), "expected a time limit above 360 s, found 300 s"),
        (("--gpus", "7"), "expected batch_size to be a multiple of 7 processes, found 16"),
    ],
)
def test_a_mistake_gets_one_line(arguments: tuple[str, str], line: str) -> None:
    from click.testing import CliRunner

    from pipeline.cli.plan import plan
    from pipeline.core.errors import UserError

    result = CliRunner().invoke(plan, [str(TINY), *arguments])
    assert isinstance(result.exception, UserError)
    assert line in str(result.exception)


@pytest.mark.slow
def test_planned_memory_is_that_of_a_real_training_within_a_tenth() -> None:
    model = next(iter(MODELS))  # all of them at all stages: python -m benchmarks.plan_memory
    tensors, _ = measured(model, stage=1)
    assert planned(model, stage=1).total == pytest.approx(tensors, rel=0.1)
