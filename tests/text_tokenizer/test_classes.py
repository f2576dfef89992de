"""Promises of captions that are classes: an id each, the pad as the null class, nothing else is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.core.errors import UserError
from pipeline.text_tokenizer import PAD_ID, TextTokenizer

CONFIG = TextTokenizerConfig()


def test_every_class_is_one_id_and_comes_back(tmp_path: Path) -> None:
    TextTokenizer.of_classes(["tabby cat", "dog", "dog", "Tabby  Cat"], CONFIG).save_pretrained(tmp_path)
    tokenizer = TextTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.text_length, tokenizer.vocab_size) == (1, 3)
    assert tokenizer.classes == ["dog", "tabby cat"]
    ids = tokenizer.encode(["dog", "tabby cat", " TABBY cat"])
    assert ids.tolist() == [[1], [2], [2]]
    assert [tokenizer.decode(row) for row in ids] == ["dog", "tabby cat", "tabby cat"]
    assert tokenizer.decode([PAD_ID]) == ""


def test_classes_that_are_numbers_have_their_ids_in_the_order_of_numbers() -> None:
    tokenizer = TextTokenizer.of_classes([str(number) for number in (10, 2, 0, 1)], CONFIG)
    assert tokenizer.classes == ["0", "1", "2", "10"]
    twice = [f"{'0' * zeros}{number}" for zeros in range(6) for number in (2, 10)]
    classes = TextTokenizer.of_classes(twice, CONFIG).classes
    assert classes == sorted(name for name in twice if int(name) == 2) + sorted(n for n in twice if int(n) == 10)


def test_what_is_no_class_is_refused_with_the_nearest_one() -> None:
    tokenizer = TextTokenizer.of_classes(["goldfish", "hammerhead"], CONFIG)
    with pytest.raises(UserError, match="one of the 2 classes .* found 'gold fish'; the nearest is 'goldfish'"):
        tokenizer.encode(["gold fish"])
    with pytest.raises(UserError, match="the nearest is"):
        tokenizer.token_counts(["[PAD]"])


def test_captions_that_are_no_classes_are_refused() -> None:
    with pytest.raises(UserError, match="found 65,536: captions that say what an image shows need condition=text"):
        TextTokenizer.of_classes(map(str, range(65_536)), CONFIG)


def test_text_has_no_classes() -> None:
    tokenizer = TextTokenizer.train(["red heart"], TextTokenizerConfig(vocab_size=300))
    assert tokenizer.classes is None
    tokenizer.check(["a dog"])
