"""Prompts as people give them: files with a byte-order mark, control characters, and none at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli.generate import _lines, _prompt, generate
from pipeline.config.generate import GenerateConfig
from pipeline.core.errors import UserError
from pipeline.sampling.checks import check_prompts
from pipeline.sampling.prompts import check_against_training


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred heart\r\n\r\n  blue  star\t\n\u200b\n".encode())
    assert _lines(file) == ["red heart", "blue star"]


def test_control_characters_are_no_part_of_a_prompt_and_end_no_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("red\x1b[31m he\x00art\x0b of gold\n")
    assert _lines(file) == ["red he art of gold"]
    assert _prompt("\x1b[2Jred\x07 heart") == "red heart"


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("rotes Herz für dich".encode("latin-1"))
    with pytest.raises(UserError, match="expected a text file in UTF-8"):
        _lines(file)


@pytest.mark.parametrize("prompt", ["", "  ", "\u200b\ufeff", "\x00", "\x1b[31m"])
def test_a_prompt_in_which_nothing_can_be_seen_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="expected a prompt"):
        _prompt(prompt)
    with pytest.raises(UserError, match="expected some text"):
        check_prompts([prompt])


@pytest.mark.parametrize(
    "options",
    [
        ["-n", "0"],
        ["-n", "-2"],
        ["--keep", "0"],
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--batch-size", "0"],
        ["--top-k", "0"],
        ["--keep-rows", "-1"],
        ["--keep-levels", "0"],
    ],
)
def test_a_number_out_of_bounds_is_refused_before_anything_is_loaded(options: list[str]) -> None:
    result = CliRunner().invoke(generate, ["nowhere", "red heart", *options])
    assert result.exit_code == 2
    assert "is not in the range" in result.output


def test_a_prompt_of_the_config_is_compared_as_captions_are_kept() -> None:
    config = GenerateConfig(training_prompts=["Red \u200b heart"])
    check_against_training(config, ["red heart"])
