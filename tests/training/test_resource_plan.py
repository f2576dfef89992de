"""`smalti plan` says before a training what is found in it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.plan_memory import MODELS, measured, planned
from pipeline.cli.plan import plan
from pipeline.config.pipeline import PipelineConfig, load_pipeline
from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
from pipeline.image_tokenizer.base import build
from pipeline.training.gpu_plan import memory
from pipeline.training.host_plan import host_memory
from pipeline.training.live_memory import LiveBytes
from pipeline.training.optimizer import muon_matrices
from pipeline.training.resource_plan import (
    SAMPLE_IMAGES,
    checkpoint_bytes,
    count,
    decoding_bytes,
    duration,
)
from pipeline.transformer.layout import Layout
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
@pytest.mark.slow
def test_plan_prints_the_published_numbers_of_dalle(published: str, dalle: str) -> None:
    assert published in dalle


@pytest.mark.slow
def test_dalle_has_12_billion_parameters_in_24_gb_and_fits_on_its_gpus_with_zero_3_alone(dalle: str) -> None:
    found = re.search(r"parameters +([\d.]+) G; ([\d.]+) GB in 16 bits", dalle)
    assert found
    assert float(found[1]) == pytest.approx(12, rel=0.03)
    assert float(found[2]) == pytest.approx(24, rel=0.03)
    too_much = re.findall(r"^[* ] (\d) .*more than 16 GB: (.*)$", dalle, re.MULTILINE)
    everything = "start, resume, step, evaluation, images, checkpoint, end"
    assert too_much == [("1", everything), ("2", everything)]
    assert "no micro-batch fits" not in dalle


def test_a_class_is_planned_as_the_one_token_that_it_is() -> None:
    overrides = ["transformer.condition=class", "generate.new_prompts=[]", "text_tokenizer.text_length=16"]
    classes, text = (count(load_pipeline(TINY, given), 1).layout for given in (overrides, overrides[1:]))
    assert (classes.text_length, text.text_length) == (1, 16)
    assert classes.length == classes.image_length + 1
    done = CliRunner().invoke(plan, [str(TINY), *overrides])
    assert "sequence        a class, counted as one of text_tokenizer.vocab_size 400 ids, then 16 codes" in done.output


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


def test_host_memory_of_a_checkpoint_and_of_the_start_is_what_a_training_had_there(tiny_run: Path) -> None:
    config = load_pipeline(tiny_run / "config.yaml")
    section, model = config.transformer, count(config, gpus=1)
    files = (tiny_run / "transformer/checkpoints/step-00000030").glob("*.safetensors")
    saved = [tensor.nbytes for file in files for tensor in load_file(file).values()]
    weights = load_file(tiny_run / "transformer/model/model.safetensors").values()
    node = host_memory(model, section.training, section.deepspeed, 1, gpus=1, per_node=1)
    pinned = sum(1 << (size - 1).bit_length() for size in saved)  # as torch gives pinned memory, which is a GPU's
    assert node.checkpoint == pytest.approx(pinned, rel=0.01)
    assert pinned > 1.1 * sum(saved)
    on_cpus = host_memory(replace(model, on_gpu=False), section.training, section.deepspeed, 1, gpus=1, per_node=1)
    assert on_cpus.checkpoint == pytest.approx(sum(saved), rel=0.01)
    assert node.start == sum(weight.nbytes for weight in weights)
    assert node.end == node.checkpoint + max(weight.nbytes for weight in weights)
    four_of_sixteen = host_memory(model, section.training, section.deepspeed, 3, gpus=16, per_node=4)
    assert four_of_sixteen.checkpoint == node.checkpoint / 4
    assert four_of_sixteen.start == 4 * max(weight.nbytes for weight in weights)


def test_host_memory_that_a_node_has_not_is_named_with_what_takes_it() -> None:
    offload = ["transformer.deepspeed.offload_optimizer=true", "transformer.deepspeed.zero_stage=2"]
    arguments = [str(TINY), *offload, "--gpus", "4", "--gpus-per-node", "2", "--host-memory-gb"]
    little = CliRunner().invoke(plan, [*arguments, "0.001"], catch_exceptions=False).output
    assert "host memory     of a node with 2 processes: start " in little
    assert "; more than 0.001 GB: start, step, checkpoint, end\n" in little
    assert "more than" not in CliRunner().invoke(plan, [*arguments, "1"], catch_exceptions=False).output


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
    from pipeline.core.errors import UserError

    result = CliRunner().invoke(plan, [str(TINY), *arguments])
    assert isinstance(result.exception, UserError)
    assert line in str(result.exception)


@pytest.mark.slow
def test_planned_memory_is_that_of_a_real_training_within_a_tenth() -> None:
    model = next(iter(MODELS))  # all of them at all stages: python -m benchmarks.plan_memory
    tensors, _ = measured(model, 1)
    assert planned(model, 1, 1).step == pytest.approx(tensors, rel=0.1)


@pytest.mark.slow
def test_at_stage_3_no_training_takes_more_than_planned_nor_much_less() -> None:
    """How many weights are gathered ahead of their use is a matter of moments there."""
    model = next(iter(MODELS))
    tensors, _ = measured(model, 3, 2)
    assert tensors <= planned(model, 3, 2).step <= 1.25 * tensors


STEP = ["transformer.width=128", "transformer.heads=4", "transformer.layers=3", "prepare.image_size=64"]
BLOCK = "transformer.training.activation_checkpointing=block"


def _kept_on_fake_cuda(
    config: PipelineConfig, layout: Layout, autocast: torch.dtype | None, weights: torch.dtype | None
) -> int:
    """Bytes that autograd keeps of one micro-batch on fake CUDA tensors, by its own hooks."""
    kept: dict[int, torch.UntypedStorage] = {}
    with fake_cuda(), patch("pipeline.transformer.attention._compiled_flex", _one_kernel):
        objective = JointObjective(Transformer(layout, config.transformer), config.transformer)
        to_fake_cuda(objective, weights)
        own = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
        size = config.transformer.training.batch_size
        lengths = {"text": layout.text_length, "codes": layout.image_length}
        batch = {name: torch.zeros(size, n, dtype=torch.long, device="cuda") for name, n in lengths.items()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cuda", autocast, bool(autocast)):
            objective(batch, 0)
    return sum(storage.nbytes() for storage in kept.values())


def _one_kernel() -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor, block_mask: object, **settings: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **settings)

    return attention


@pytest.mark.parametrize(
    ("style", "precision", "autocast", "weights"),
    [
        ("transformer.style=classic", "bf16", None, torch.bfloat16),
        ("transformer.attention=sparse", "bf16", None, torch.bfloat16),
        ("transformer.style=modern", "bf16-autocast", torch.bfloat16, None),
        ("transformer.style=modern", "fp32", None, None),
    ],
)
def test_planned_activations_are_what_autograd_keeps_on_a_gpu(
    style: str, precision: str, autocast: torch.dtype | None, weights: torch.dtype | None
) -> None:
    config = load_pipeline(TINY, [*STEP, style, f"transformer.training.precision={precision}"])
    planned = count(config, gpus=1)
    found = _kept_on_fake_cuda(config, planned.layout, autocast, weights)
    assert planned.passes.kept == pytest.approx(found, rel=0.05)


def test_recomputed_blocks_keep_their_inputs_alone() -> None:
    config = load_pipeline(TINY, [*STEP, BLOCK])
    model, width = count(config, gpus=1), config.transformer.width
    inputs = 2 * 3 * model.micro_batch * model.layout.length * width  # in bf16, of three blocks
    head = load_pipeline(TINY, [*STEP[:2], "transformer.layers=1", STEP[3], BLOCK])
    outside = count(head, gpus=1).passes.kept - inputs // 3
    assert model.passes.kept == pytest.approx(inputs + outside, rel=0.01)
    assert model.passes.kept < count(load_pipeline(TINY, STEP), gpus=1).passes.kept / 2


def test_blocks_recomputed_under_autocast_are_planned_like_others() -> None:
    autocast = [*STEP, "transformer.training.precision=bf16-autocast"]
    recomputed, whole = (count(load_pipeline(TINY, settings), gpus=1) for settings in ([*autocast, BLOCK], autocast))
    assert recomputed.passes.kept < whole.passes.kept / 2
    assert recomputed.passes.evaluation == whole.passes.evaluation


def test_gradients_that_stay_are_counted_in_a_pass_that_lets_them_go() -> None:
    alone = ["transformer.training.precision=fp32", "transformer.training.batch_size=1"]
    config = load_pipeline(TINY, [*STEP, *alone])
    model = count(config, gpus=1, device="cpu")
    live, parts = LiveBytes(), {"text": model.layout.text_length, "codes": model.layout.image_length}
    with FakeTensorMode():
        objective = JointObjective(Transformer(model.layout, config.transformer), config.transformer)
        batch = {name: torch.zeros(model.micro_batch, n, dtype=torch.long) for name, n in parts.items()}
        for tensor in (*objective.parameters(), *objective.buffers(), *batch.values()):
            live.know(tensor)
        with live:
            objective(batch, 0)[0].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert model.passes.with_gradients == pytest.approx(live.peak, rel=0.001)
    assert model.passes.without_gradients < model.passes.with_gradients


def test_on_gpus_bf16_halves_weights_and_gradients_and_the_average_is_partitioned() -> None:
    config = load_pipeline(TINY, [*STEP, "transformer.training.ema_decay=0.99", "transformer.training.batch_size=8"])
    model, section = count(config, gpus=8), config.transformer
    needs = [memory(model, section.training, section.deepspeed, stage, gpus=8) for stage in (1, 2, 3)]
    parameters = model.parameters
    assert [need.weights for need in needs[:2]] == [2 * parameters] * 2
    assert needs[1].gradients == 2 * parameters / 8
    assert [need.optimizer for need in needs] == [12 * parameters / 8] * 3
    assert [need.average for need in needs] == [4 * parameters / 8] * 3
    float32 = count(load_pipeline(TINY, [*STEP, "transformer.training.precision=fp32"]), gpus=8)
    assert memory(float32, section.training, section.deepspeed, 1, gpus=8).weights == 4 * parameters


@pytest.mark.slow
def test_a_micro_batch_that_does_not_fit_says_the_one_that_does() -> None:
    config = load_pipeline(TINY, STEP)
    training, deepspeed = config.transformer.training, config.transformer.deepspeed
    half = load_pipeline(TINY, [*STEP, f"transformer.training.micro_batch_size={training.batch_size // 2}"])
    limit = 1.01 * memory(count(half, 1), half.transformer.training, deepspeed, 1, 1).step / 1e9
    arguments = [str(TINY), *STEP, "--gpus", "1", "--gpu", "small", "--peak-tflops", "1", "--memory-gb", f"{limit:.6f}"]
    shown = CliRunner().invoke(plan, arguments, catch_exceptions=False).output
    assert f"a micro-batch of {training.batch_size} does not fit: set transformer.training.micro_batch_size=" in shown
    assert f"micro_batch_size={training.batch_size // 2}\n" in shown
    tiny = CliRunner().invoke(plan, [*arguments[:-1], "0.001"], catch_exceptions=False).output
    assert "no micro-batch fits: more GPUs" in tiny
    assert "0 fit: the weights alone fill the GPU" in tiny


def test_planned_bytes_of_decoding_sample_images_are_those_of_real_tensors() -> None:
    config = load_pipeline(TINY)
    image_tokenizer = build(config.image_tokenizer.model, config.prepare.image_size)
    found = decoding_bytes(image_tokenizer)
    pixels = torch.zeros(SAMPLE_IMAGES, 3, config.prepare.image_size, config.prepare.image_size)
    assert found > pixels.nbytes
    model = count(config, gpus=1)
    assert model.decoding == found
    section = config.transformer
    peaks = [
        memory(replace(model, decoding=size), section.training, section.deepspeed, 1, gpus=1).images
        for size in (0, 10**9)
    ]
    assert peaks[1] - peaks[0] == 10**9 - model.cache_row * SAMPLE_IMAGES * (1 + 9 / model.layout.length)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), "raster: 16 passes"),
        (("transformer.order=any", "generate.sampling.passes=4"), "any: 4 passes"),
        (
            (
                "transformer.order=scale",
                "image_tokenizer.model={kind: vqvae, patch_size: 2, widths: [8, 8], blocks: 1,"
                " quantizer: {kind: multiscale, scales: [1, 2, 4], codebook: {kind: ema, codebook_size: 64}}}",
            ),
            "scale: 3 passes",
        ),
    ],
)
@pytest.mark.slow
def test_plan_tells_how_often_the_transformer_runs_for_an_image(overrides: tuple[str, ...], expected: str) -> None:
    result = CliRunner().invoke(plan, [str(TINY), *overrides])
    found = re.search(r"^order +(\w+: \d+ passes) and ([\d.]+) M FLOPs per image", result.output, re.MULTILINE)
    assert found, result.output
    assert found[1] == expected
    per_token = re.search(r"^FLOPs +([\d.]+) k per token.*", result.output, re.MULTILINE)
    length = re.search(r"\): (\d+)$", result.output, re.MULTILINE)
    assert per_token
    assert length
    assert float(found[2]) == pytest.approx(float(per_token[1]) / 3 * int(length[1]) / 1000, rel=0.01)
