"""Promises of `Pipeline`, image prompts, `smalti generate` and `smalti export`."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.base import identity
from pipeline.config.generate import SamplingConfig
from pipeline.config.reranker import TowerConfig
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.config.transformer import TransformerShape
from pipeline.core import image_size
from pipeline.core.errors import UserError
from pipeline.core.pretrained import cast
from pipeline.image_tokenizer.base import ImageTokenizer, build
from pipeline.reranker.model import TwoTowers
from pipeline.sampling import pipeline as generation
from pipeline.sampling.batch_memory import bytes_per_image
from pipeline.sampling.decode import draw_codes
from pipeline.sampling.export import export_run
from pipeline.sampling.image_prompt import ImagePrompt, known_codes
from pipeline.sampling.pipeline import Callbacks, GeneratedImage, Pipeline, keep_best, sampling_dtype
from pipeline.sampling.preview import Preview
from pipeline.sampling.save import read_metadata
from pipeline.sampling.to_directory import GenerateJob, generate_folder, generate_sheet
from pipeline.text_tokenizer.bpe import TextTokenizer
from pipeline.transformer.layout import Layout
from pipeline.transformer.model import Transformer
from tests.launch import launch

PROMPTS = ["joker", "red joker", "Brazil"]
EVERYTHING = SamplingConfig(temperature=5, top_k=60, top_p=0.99, min_p=0.001, guidance=2.0, guidance_schedule="linear")


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path) -> Pipeline:
    return Pipeline.from_pretrained(tiny_run)


def same(one: list[GeneratedImage], other: list[GeneratedImage]) -> bool:
    return len(one) == len(other) and all(
        a.image.tobytes() == b.image.tobytes() for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("sampling", [SamplingConfig(), EVERYTHING])
def test_an_image_depends_on_seed_prompt_and_candidate_alone(pipeline: Pipeline, sampling: SamplingConfig) -> None:
    few = pipeline.generate(PROMPTS, 2, 7, sampling, batch_size=1)
    many = pipeline.generate(PROMPTS, 3, 7, sampling, batch_size=5)
    assert same(few, [many[i] for i in (0, 1, 3, 4, 6, 7)])
    assert same(pipeline.generate(PROMPTS[2:], 2, 7, sampling, first_prompt=2), few[4:])
    assert not same(pipeline.generate(PROMPTS, 2, 8, sampling), few)


def test_a_completed_image_keeps_its_first_rows_and_a_filled_one_what_is_outside_of_the_mask(
    pipeline: Pipeline,
) -> None:
    image = pipeline.generate(["joker"], seed=3)[0].image
    tokenizer = pipeline.image_tokenizer
    level = tokenizer.levels[0]
    own = known_codes(tokenizer, ImagePrompt(image, mask=_mask(16, (0, 0, 16, 16))), torch.device("cpu"))
    assert (own == -1).all()
    rows = known_codes(tokenizer, ImagePrompt(image, keep_rows=3), torch.device("cpu"))
    assert ((rows != -1).view(level.height, level.width).all(1) == (torch.arange(level.height) < 3)).all()
    hole = known_codes(tokenizer, ImagePrompt(image, mask=_mask(16, (3, 5, 4, 9))), torch.device("cpu"))
    side = 16 // level.height
    expected = np.zeros((level.height, level.width), bool)
    expected[5 // side : 8 // side + 1, 3 // side : 3 // side + 1] = True
    assert np.array_equal((hole == -1).view(level.height, level.width).numpy(), expected)
    filled = pipeline.generate(["joker"], 6, 0, keep=2, image_prompt=ImagePrompt(image, mask=_mask(16, (3, 5, 4, 9))))
    best, second = (one.score for one in filled)
    assert best is not None
    assert second is not None
    assert best >= second


def test_the_best_candidates_of_each_prompt_are_kept_best_first() -> None:
    image = Image.new("RGB", (1, 1))
    scores = {0: [1.0, 3.0, 2.0], 1: [-5.0, -4.0, -4.0]}
    generated = [
        GeneratedImage(image, prompt, j, score) for prompt, row in scores.items() for j, score in enumerate(row)
    ]
    assert [(one.prompt, one.candidate) for one in keep_best(generated, 2)] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def _mask(side: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (side, side))
    mask.paste(255, box)
    return mask


def test_an_export_generates_the_same_images_without_the_run(
    tiny_run: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    export_run(tiny_run, tmp_path / "export")
    suffixes = {path.suffix for path in (tmp_path / "export").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".md", ".png"}
    exported = Pipeline.from_pretrained(tmp_path / "export")
    assert exported.source.model_hash == pipeline.source.model_hash
    assert same(exported.generate(["joker"], 2, 5), pipeline.generate(["joker"], 2, 5))
    card = (tmp_path / "export" / "README.md").read_text()
    for told in (
        "CC BY-SA 4.0",
        "captioned images for training",
        "2 layers, width 64",
        "val/loss/image",
        "FD (Lite0)",
        pipeline.source.model_hash,
    ):
        assert told in card, told
    with pytest.raises(UserError, match="expected a new or empty folder"):
        export_run(tiny_run, tmp_path / "export")


def test_a_stopped_job_resumes_and_other_settings_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    job = GenerateJob(PROMPTS, candidates=2, batch_size=2, seed=4)
    assert generate_folder(pipeline, job, tmp_path) == 6
    images = sorted(tmp_path.glob("0*.png"))
    before = {path: path.read_bytes() for path in images}
    metadata = read_metadata(images[3])
    assert metadata is not None
    assert (metadata["prompt"], metadata["candidate"], metadata["seed"]) == ("red joker", 1, 4)
    assert metadata["model"] == pipeline.source.model_hash
    assert metadata["sampling"] == identity(SamplingConfig(dtype="fp32"))  # what auto is on CPUs
    images[3].unlink()
    kept = images[0].stat().st_mtime_ns
    generate_folder(pipeline, job, tmp_path)
    assert {path: path.read_bytes() for path in sorted(tmp_path.glob("0*.png"))} == before
    assert images[0].stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="was generated with another seed"):
        generate_folder(pipeline, GenerateJob(PROMPTS, candidates=2, seed=5), tmp_path)


def test_a_folder_of_another_image_prompt_of_the_same_name_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    def job(color: str) -> GenerateJob:
        image = ImagePrompt(Image.new("RGB", (16, 16), color), keep_rows=1)
        return GenerateJob(["joker"], image_prompt=image, image_prompt_options={"image": "start.png"})

    assert generate_folder(pipeline, job("red"), tmp_path) == generate_folder(pipeline, job("red"), tmp_path)
    with pytest.raises(UserError, match="was generated with another image_prompt_sha256"):
        generate_folder(pipeline, job("blue"), tmp_path)


def test_a_folder_whose_images_another_reranker_chose_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    rankers = []
    for name in ("one", "other"):
        text = TextTokenizer.from_pretrained(tiny_run / "text-tokenizer")
        towers = TwoTowers(TowerConfig(width=8, layers=1, heads=1, patch_size=4), 16, text.text_length, text.vocab_size)
        towers.save_pretrained(tmp_path / name)
        rankers.append(Pipeline.from_pretrained(tiny_run, reranker=tmp_path / name))
    job = GenerateJob(["joker"], candidates=2, keep=1)
    for _ in range(2):
        assert generate_folder(rankers[0], job, tmp_path / "images") == 1
    with pytest.raises(UserError, match="was generated with another reranker"):
        generate_folder(rankers[1], job, tmp_path / "images")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": "joker"}, "expected a list"),
        ({"prompts": ["joker", "  "]}, "prompt 1: expected some text"),
        ({"prompts": [3]}, "prompt 0: expected some text, found 3"),
        ({"prompts": ["half \ud83d"]}, "expected Unicode text"),
        ({"sampling": SamplingConfig(top_k=65)}, "at most the 64 codes"),
        ({"keep": 1}, "no reranker"),
        ({"keep": 3, "candidates": 2}, "keep: expected 1 to 2, the number of candidates, found 3"),
        ({"candidates": 0}, "at least 1"),
    ],
)
def test_bad_input_gets_one_line(pipeline: Pipeline, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as found:
        pipeline.generate(**({"prompts": ["joker"]} | arguments))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        (
            {"keep_rows": 2, "keep_levels": 1},
            "needs one of keep_rows, keep_levels and mask, found keep_rows and keep_l",
        ),
        ({}, "found none"),
        ({"keep_rows": 4}, "keep_rows: expected 1 to 3"),
        ({"keep_levels": 1}, "keep_levels needs an image tokenizer of several levels, found one: use keep_rows"),
        ({"mask": Image.new("L", (16, 16))}, "found none"),
        ({"mask": Image.new("L", (8, 16))}, "a mask of 16×16 pixels, found 8×16"),
        ({"keep_rows": 2, "image": Image.new("RGB", (32, 32))}, "an image of 16×16 pixels, found 32×32: resize"),
    ],
)
def test_a_wrong_image_prompt_gets_one_line(pipeline: Pipeline, prompt: dict[str, Any], complaint: str) -> None:
    def complete() -> None:
        image_prompt = ImagePrompt(**({"image": Image.new("RGB", (16, 16))} | prompt))
        pipeline.generate(["joker"], image_prompt=image_prompt)

    with pytest.raises(UserError, match=complaint):
        complete()


def test_over_long_and_wordless_prompts_are_told_and_generated(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    images = pipeline.generate(["joker " * 50, "🙂"])
    assert len(images) == 2
    assert "1 of 2 prompts are longer than the window of 8 tokens and were cut; shorten them" in caplog.text
    assert "1 of 2 prompts hold no letter or digit" in caplog.text


def test_guidance_without_caption_dropout_and_unfinished_runs_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_bytes((tiny_run / name).read_bytes())
    for stage in ("text-tokenizer", "image-tokenizer", "transformer"):
        (tmp_path / stage).symlink_to(tiny_run / stage)
    pipeline = Pipeline.from_pretrained(tmp_path)
    pipeline.source = replace(pipeline.source, guidance_trained=False)
    with pytest.raises(UserError, match="guidance 2 needs a transformer trained with transformer.caption_dropout"):
        pipeline.generate(["joker"], sampling=SamplingConfig(guidance=2))
    config = (tmp_path / "config.yaml").read_text()
    assert "caption_dropout: 0.1" in config
    (tmp_path / "config.yaml").write_text(config.replace("caption_dropout: 0.1", "caption_dropout: 0.0"))
    with pytest.raises(
        UserError, match=r"not finished for the run's config \(transformer.caption_dropout: 0.1 -> 0.0\)"
    ):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "transformer").unlink()
    with pytest.raises(UserError, match="the stage transformer has not finished training: run `smalti run`"):
        Pipeline.from_pretrained(tmp_path)


def test_the_command_completes_and_refuses_in_one_line(tiny_run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    (tmp_path / "prompts.txt").write_text("joker\n\nred joker\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--image", str(tmp_path / "red.png"), "--keep-rows", "2"]
    output = launch("pipeline", "generate", str(tiny_run), *options, "--guidance", "2", "-o", str(tmp_path / "out"))
    assert "2 images in" in output
    assert "token/s" in output
    assert (tmp_path / "out" / "grid.png").exists()
    tokenizer = ImageTokenizer.from_pretrained(tiny_run / "image-tokenizer" / "model")
    metadata = read_metadata(tmp_path / "out" / "000001-00.png")
    assert metadata is not None
    assert metadata["image_prompt"] == {"image": str(tmp_path / "red.png"), "keep_rows": "2"}
    assert tokenizer.image_size == 16
    wrong = launch("pipeline", "generate", str(tiny_run), "joker", "--keep-rows", "4", check=False)
    assert wrong.strip() == "error: --keep-rows needs an image to start from: add --image IMAGE"


def test_a_sheet_of_too_many_images_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a sheet holds 1024"):
        generate_sheet(pipeline, GenerateJob(["joker"], candidates=1025), tmp_path / "sheet.png")


@pytest.fixture(scope="module")
def two_levels() -> Pipeline:
    """Untrained models whose images have 4×4 coarse and 8×8 fine codes."""
    torch.manual_seed(0)
    ema = {"kind": "ema", "codebook_size": 32, "code_width": 8}
    shape = {"patch_size": 2, "widths": [16, 16], "blocks": 1, "block_kernels": [3, 1]}
    tokenizer = build({"kind": "vqvae2", "quantizers": [ema, ema], **shape}, 16).eval()
    text = TextTokenizer.train(["red joker", "Brazil"], TextTokenizerConfig(vocab_size=270, text_length=6))
    layout = Layout.of(text.text_length, text.vocab_size, tokenizer.levels)
    transformer = Transformer(layout, TransformerShape(layers=1, width=32, heads=2)).eval()
    torch.nn.init.normal_(transformer.head.weight)
    return Pipeline(text, transformer, tokenizer)


def test_a_variation_keeps_the_coarse_level_and_generates_the_fine_one(two_levels: Pipeline) -> None:
    coarse, fine = two_levels.image_tokenizer.levels
    assert (coarse.height, fine.height) == (4, 8)
    image = two_levels.generate(["red joker"], seed=3)[0].image
    known = known_codes(two_levels.image_tokenizer, ImagePrompt(image, keep_levels=1), torch.device("cpu"))
    assert (known[:16] != -1).all()
    assert (known[16:] == -1).all()
    rows = known_codes(two_levels.image_tokenizer, ImagePrompt(image, keep_rows=2), torch.device("cpu"))
    assert (rows != -1).nonzero().flatten().tolist() == [*range(4), *range(16, 32)]
    varied = two_levels.generate(["red joker"], 3, image_prompt=ImagePrompt(image, keep_levels=1))
    assert len({one.image.tobytes() for one in varied}) == 3
    assert same(
        varied, two_levels.generate(["red joker"], 3, image_prompt=ImagePrompt(image, keep_levels=1), batch_size=1)
    )


def test_the_same_images_whatever_fits_into_memory(two_levels: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = two_levels.generate(["red joker", "Brazil"], 3, 7)
    model = two_levels.transformer
    image_bytes = bytes_per_image(model.layout, model.shape, 4, guided=False)
    monkeypatch.setattr(generation, "free_bytes", lambda _: 3 * image_bytes)  # for two of the six
    monkeypatch.setattr(image_size, "PIXELS_AT_ONCE", 16 * 16)
    with (
        mock.patch.object(two_levels.image_tokenizer, "decode", wraps=two_levels.image_tokenizer.decode) as decode,
        mock.patch.object(generation, "draw_codes", wraps=draw_codes) as draw,
    ):
        assert same(two_levels.generate(["red joker", "Brazil"], 3, 7), expected)
    assert [len(call.args[2]) for call in draw.call_args_list] == [2, 2, 2]
    assert [len(call.args[0][0]) for call in decode.call_args_list] == [1] * 6


def test_the_transformer_is_cast_once_and_never_back(two_levels: Pipeline) -> None:
    own = two_levels.transformer
    half = SamplingConfig(dtype="bf16")
    with mock.patch.object(generation, "cast", wraps=cast) as casts:
        images = [two_levels.generate(["red joker"], sampling=half) for _ in range(3)]
    casts.assert_called_once_with(own, torch.bfloat16)
    assert two_levels.transformer is own
    assert own.head.weight.dtype == torch.float32
    loaded = Pipeline(two_levels.text_tokenizer, cast(own, torch.bfloat16), two_levels.image_tokenizer)
    assert same(loaded.generate(["red joker"]), images[0])  # auto: as it was loaded
    assert loaded.told(SamplingConfig()).dtype == "bf16"
    with pytest.raises(UserError, match=r"expected auto, or the precision .* \(torch.bfloat16\), found fp32; load it"):
        loaded.generate(["red joker"], sampling=SamplingConfig(dtype="fp32"))


def test_bf16_is_the_default_where_the_device_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert sampling_dtype("auto", cpu) == torch.float32
    assert sampling_dtype("bf16", cpu) == torch.bfloat16
    for can, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, can=can: can)
        assert sampling_dtype("auto", gpu) == expected
        assert sampling_dtype("fp32", gpu) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(UserError, match="expected fp32 or auto, since Tesla T4 does not compute in bf16, found bf16"):
        sampling_dtype("bf16", gpu)


def test_bf16_on_a_cpu_without_it_says_once_what_is_quicker(
    two_levels: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
    loaded = Pipeline(
        two_levels.text_tokenizer, cast(two_levels.transformer, torch.bfloat16), two_levels.image_tokenizer
    )
    two_levels.generate(["red joker"])
    assert not caplog.text
    for each, sampling in ((loaded, SamplingConfig()), (two_levels, SamplingConfig(dtype="bf16"))):
        generation._tell_of_slow_bf16.cache_clear()
        caplog.clear()
        for _ in range(2):
            each.generate(["red joker"], sampling=sampling)
        assert caplog.text.count("drawing takes longer than with dtype=fp32") == 1


def test_compile_without_a_compiler_is_one_line(two_levels: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--compile \(generate.compile\): expected a C\+\+ compiler .* found none"):
        two_levels.generate(["red joker"], compiled=True)


def test_the_preview_fills_in_row_by_row_over_itself(pipeline: Pipeline) -> None:
    stream = io.StringIO()
    pipeline.generate(["joker"], callbacks=Callbacks(on_row=Preview(pipeline, stream)))
    frames = stream.getvalue().split("\r\x1b[K")[1:]
    assert [frame.count("▀") for frame in frames] == [32 * lines for lines in (4, 8, 12, 16)]
    assert [re.findall(r"\x1b\[(\d+)A", frame) for frame in frames] == [[], ["4"], ["8"], ["12"]]
