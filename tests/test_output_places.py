"""Where images, sheets and exports go: formats by the name's extension; a place that cannot be written is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.cli.main import cli
from pipeline.core.errors import UserError
from pipeline.core.writable import check_writable
from pipeline.sampling.export import export_run
from pipeline.sampling.pipeline import Pipeline
from pipeline.sampling.save import check_output, read_metadata, save_image
from pipeline.sampling.to_directory import GenerateJob, generate_sheet
from tests.conftest import TINY
from tests.data.sample_images import image
from tests.launch import environment


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("name", "kind"), [("x.png", "PNG"), ("x.JPG", "JPEG"), ("x.jpeg", "JPEG"), ("x.webp", "WEBP")]
)
def test_the_extension_is_the_format_and_the_metadata_is_in_every_one(tmp_path: Path, name: str, kind: str) -> None:
    assert check_output(tmp_path / name)
    metadata = {"prompt": "ein Bär 🐻", "seed": 7}
    save_image(image(0), tmp_path / name, metadata)
    with Image.open(tmp_path / name) as found:
        assert found.format == kind
    assert read_metadata(tmp_path / name) == metadata


def test_prompts_that_a_jpeg_cannot_hold_are_left_out_of_it(tmp_path: Path) -> None:
    save_image(image(0), tmp_path / "x.jpg", {"seed": 7, "prompts": ["a" * 200] * 1_000})
    assert read_metadata(tmp_path / "x.jpg") == {"seed": 7}


def test_a_sheet_larger_than_its_format_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x.webp: expected at most 16,383 pixels a side \(WEBP\), found 16,384 × 1"):
        save_image(Image.new("RGB", (16_384, 1)), tmp_path / "x.webp", {})
    assert not (tmp_path / "x.webp").exists()


def test_a_folder_with_a_dot_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "images.v2").mkdir()
    (tmp_path / "photos.png").mkdir()
    assert not check_output(tmp_path / "images.v2")
    assert not check_output(tmp_path / "photos.png")
    assert not check_output(tmp_path / "new")
    assert list((tmp_path / "images.v2").iterdir()) == []


@pytest.mark.parametrize("name", ["x.gif", "x.v2", "taken"])
def test_other_formats_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"expected a file that ends in .png, .jpg, .jpeg, .webp, or a folder"):
        check_output(tmp_path / name)


NOWHERE = [
    "/proc/x.png",
    "/proc/x/y.png",
    "/dev/null/x.png",
    f"/tmp/{'x' * 300}.png",
    f"/tmp/{'x' * 300}",
    "/tmp/a\0b.png",
]


@pytest.mark.parametrize("path", NOWHERE)
def test_places_that_cannot_be_written_are_one_line(path: str) -> None:
    for check in (check_output, check_writable):
        with pytest.raises(UserError, match="expected a place to write to, found: .*; choose another"):
            check(Path(path))


@pytest.mark.parametrize("option", [("-n", "0"), ("-n", "-2"), ("--batch-size", "0"), ("--keep", "0")])
def test_no_images_are_a_mistake(tmp_path: Path, option: tuple[str, str]) -> None:
    result = invoke("generate", tmp_path, "a prompt", *option)
    assert result.exit_code == 2
    assert "is not in the range x>=1" in result.output


@pytest.mark.parametrize("option", ["-o", "--save-real", "--save-fake", "--cache"])
def test_evaluate_asks_for_its_places_first(tmp_path: Path, option: str) -> None:
    result = invoke("evaluate", "--real", tmp_path, "--fake", tmp_path, option, "/proc/x.npz")
    assert isinstance(result.exception, UserError)
    assert "/proc/x.npz" in str(result.exception)
    assert "expected a place to write to" in str(result.exception)
    result = invoke("reconstruct", tmp_path, tmp_path, "-o", "/proc/x")
    assert "/proc/x/metrics.json: expected a place to write to" in str(result.exception)


def test_an_export_goes_to_a_place_that_can_be_written(tiny_run: Path, tmp_path: Path) -> None:
    for target in ("/proc/x", f"/tmp/{'x' * 300}", "/dev/null/x"):
        with pytest.raises(UserError, match="expected a place to write to"):
            export_run(tiny_run, Path(target))
    for target in (".", "/"):
        with pytest.raises(UserError, match=r"expected a new or empty folder|expected a place to write to"):
            export_run(tiny_run, Path(target))
    export_run(tiny_run, tmp_path / "export")
    _, front, body = (tmp_path / "export" / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["license"] == "cc-by-sa-4.0"
    assert about["library_name"] == "smalti"
    assert "text-to-image" in about["tags"]
    assert about["datasets"] == ["openmoji"]
    assert "OpenMoji" in about["dataset_credit"]
    assert body.startswith("\n# tiny")
    code = """
from transformers import AutoModel
try:
    AutoModel.from_pretrained('export/transformer')
except ValueError as error:
    print(error)
import pipeline.transformer.hf
print(type(AutoModel.from_pretrained('export/transformer')))
"""
    load = [sys.executable, "-c", code]
    done = subprocess.run(load, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, _, loaded = done.stdout.rstrip().rpartition("\n")
    assert "type `smalti: first run `import pipeline.transformer.hf`" in refused
    assert "pipeline.transformer.hf" in loaded


def test_a_sheet_that_a_webp_cannot_hold_is_told_before_any_image_is_generated(tmp_path: Path) -> None:
    pipeline = SimpleNamespace(image_tokenizer=SimpleNamespace(image_size=32))  # can generate nothing
    job = GenerateJob(["a"] * 1_000)
    with pytest.raises(UserError, match=r"x.webp: expected at most 16,383 pixels a side .*: save it as .png"):
        generate_sheet(cast(Pipeline, pipeline), job, tmp_path / "x.webp")


def test_generate_into_a_jpg_and_into_a_folder_with_a_dot_whatever_the_prompt(tiny_run: Path, tmp_path: Path) -> None:
    prompt = "red heart " * 100 + "/../x"
    assert invoke("generate", tiny_run, prompt, "-o", tmp_path / "x.jpg").exit_code == 0
    assert (read_metadata(tmp_path / "x.jpg") or {})["prompt"] == prompt
    (tmp_path / "images.v2").mkdir()
    assert invoke("generate", tiny_run, prompt, "-o", tmp_path / "images.v2").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "images.v2").iterdir()) == ["000000-00.png", "grid.png"]
    for output in ("/proc/x.png", "/proc/x", tmp_path / "x.gif"):
        result = invoke("generate", tiny_run, "a", "-o", output)
        assert isinstance(result.exception, UserError)


def test_images_of_other_settings_stay_also_where_one_before_them_is_gone(tiny_run: Path, tmp_path: Path) -> None:
    assert invoke("generate", tiny_run, "red heart", "-n", 3, "-o", tmp_path / "out").exit_code == 0
    (tmp_path / "out" / "000000-00.png").unlink()
    kept = (tmp_path / "out" / "000000-02.png").read_bytes()
    result = invoke("generate", tiny_run, "blue cat", "-n", 3, "-o", tmp_path / "out")
    assert "000000-01.png was generated with another prompt" in str(result.exception)
    assert (tmp_path / "out" / "000000-02.png").read_bytes() == kept
    assert invoke("generate", tiny_run, "red heart", "-n", 3, "-o", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "000000-00.png").exists()


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("generate", "--temperature", "0.7"),
        ("generate", "-o", "x"),
        ("evaluate", "--samples", "9"),
        ("evaluate", "-o", "x"),
    ],
)
def test_options_that_a_stage_does_not_follow_are_refused_beside_a_config(
    command: str, option: str, value: str
) -> None:
    result = invoke(command, "--config", TINY, option, value)
    assert isinstance(result.exception, UserError)
    assert f"expected none beside --config, which runs the stage {command}" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["-o", "images.tiff"], "images.tiff: expected a file that ends in .png"),
        (["-o", "sheet.png", "-n", 1025], "a sheet holds 1024 images, found more: give a folder"),
        (["-o", "sheet.webp", "-n", 1000], "sheet.webp: expected at most 16,383 pixels a side"),
        (["--keep-rows", 2], "--keep-rows needs an image to start from"),
        (["--extend", "left=8"], "--extend needs an image to start from"),
        (["--image", "red.png", "--extend", "left"], "--extend: expected a side and pixels, as left=8 or top=4,left=8"),
        (["--image", "red.png", "--extend", "left=4,right=4"], "extend: expected left or right, found both"),
        (["--image", "red.png", "--extend", "left=4", "--keep-rows", 2], "--extend makes a mask of its own: leave out"),
        (["--top-p", 2], "'top_p': Input should be less than or equal to 1"),
    ],
)
def test_mistakes_of_the_command_are_told_before_the_models_load(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], complaint: str
) -> None:
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda *_, **__: pytest.fail("the models were loaded"))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("red.png")
    result = invoke("generate", tiny_run, "joker", *options)
    assert isinstance(result.exception, UserError), result.output
    assert complaint in str(result.exception)
