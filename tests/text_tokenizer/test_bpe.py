"""Promises of pipeline/text_tokenizer/bpe.py."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.core.errors import UserError
from pipeline.text_tokenizer import PAD_ID, TextTokenizer

CAPTIONS = ["red heart", "blue heart", "grinning face", "grinning cat", "flag: Åland Islands", "red apple"] * 3


def trained(**options: object) -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, TextTokenizerConfig.model_validate({"vocab_size": 300, **options}))


def test_any_caption_comes_back_normalised() -> None:
    tokenizer = trained(text_length=64)
    for caption, expected in {
        "red heart": "red heart",
        "  Red \n HEART ": "red heart",
        "飛行機 ✈️ ñandú": "飛行機 ✈️ ñandú",
        "[PAD] is text": "[pad] is text",
    }.items():
        assert tokenizer.decode(tokenizer.encode([caption])[0]) == expected


def test_pad_is_zero_and_no_text_contains_it() -> None:
    ids = trained(text_length=40, lowercase=False).encode(["[PAD]", "red"])
    assert PAD_ID == 0
    for row in ids.tolist():
        length = len([i for i in row if i])
        assert length > 0
        assert row[length:] == [PAD_ID] * (40 - length)


def test_captions_longer_than_the_window_are_cut_and_counted() -> None:
    tokenizer = trained(text_length=3)
    captions = ["red", "a caption that is far too long for three tokens"]
    ids, counts = tokenizer.encode(captions), tokenizer.token_counts(captions)
    assert ids.shape == (2, 3)
    assert (ids[1] != PAD_ID).all()
    assert counts[0] <= 3 < counts[1]
    wide = trained(text_length=64).encode(captions)
    assert (wide[:, :3] == ids).all()


def test_case_matters_only_without_lowercase() -> None:
    words = ["Red", "red"]
    same, different = trained().encode(words), trained(lowercase=False).encode(words)
    assert (same[0] == same[1]).all()
    assert (different[0] != different[1]).any()


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    tokenizer = trained()
    tokenizer.save_pretrained(tmp_path)
    loaded = TextTokenizer.from_pretrained(tmp_path)
    assert (loaded.vocab_size, loaded.text_length) == (tokenizer.vocab_size, tokenizer.text_length)
    probe = [*CAPTIONS, "[PAD] unseen"]
    assert (loaded.encode(probe) == tokenizer.encode(probe)).all()


def test_training_gives_the_same_bytes_in_every_process_and_order(tmp_path: Path) -> None:
    script = (
        "import sys; from pipeline.text_tokenizer import TextTokenizer;"
        "from pipeline.config.text_tokenizer import TextTokenizerConfig as C;"
        "words = [f'{a}{b} {b}{c}' for a in 'abcdef' for b in 'ghijkl' for c in 'mnopqr'];"
        "words = words[::-1] if sys.argv[2] == '1' else words;"
        "TextTokenizer.train(words, C(vocab_size=400)).save_pretrained(sys.argv[1])"
    )
    for number in range(3):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / str(number)), str(number % 2)], check=True)
    assert len({(tmp_path / str(number) / "tokenizer.json").read_bytes() for number in range(3)}) == 1


def test_importing_the_text_tokenizer_loads_no_torch() -> None:
    code = "import sys, pipeline.text_tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_or_damaged_files_are_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected tokenizer.json"):
        TextTokenizer.from_pretrained(tmp_path)
    trained().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        TextTokenizer.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no captions"):
        TextTokenizer.train([], TextTokenizerConfig())


def test_dropout_of_nothing_is_the_plain_encoding_and_of_something_spells_the_same_caption() -> None:
    tokenizer = trained(text_length=64)
    captions = ["red heart", "Grinning  CAT\nface", "flag: Åland Islands", "[PAD] 飛行機 ✈️", "appleapple redredheart"]
    several = 0
    for caption in captions:
        plain = tokenizer.encode([caption])[0].tolist()
        assert tokenizer.encode_with_dropout(caption, 0.0, random.Random(0)) == plain
        cuts = {tuple(tokenizer.encode_with_dropout(caption, 0.5, random.Random(seed))) for seed in range(8)}
        several += len(cuts) > 1
        assert {tokenizer.decode(cut) for cut in cuts} == {tokenizer.decode(plain)}
    assert several >= 3


def test_dropout_leaves_out_merges_at_its_rate_and_is_a_function_of_its_random_numbers() -> None:
    tokenizer = TextTokenizer.train(["ab"] * 9, TextTokenizerConfig(vocab_size=259, text_length=8))  # " a" + "b"
    words = [tokenizer.encode_with_dropout("ab", 0.1, random.Random(seed)) for seed in range(2000)]
    whole = sum(ids[1] == PAD_ID for ids in words) / 2000
    assert 0.78 < whole < 0.84  # two merges, each there in 9 cases of 10
    assert words[:50] == [tokenizer.encode_with_dropout("ab", 0.1, random.Random(seed)) for seed in range(50)]
