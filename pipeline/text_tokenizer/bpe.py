"""Captions to token ids: byte-level BPE through Hugging Face `tokenizers`, or of captions that are classes an id each.

    tokenizer = TextTokenizer.train(captions, TextTokenizerConfig(vocab_size=1024, text_length=16))
    ids = tokenizer.encode(["red heart"])     # int64 [1, 16]: the caption's tokens, then zeros (pad)

Byte-level, so every caption has tokens, whatever its script. Unicode is brought to NFC, runs of white
space become one space, and with `lowercase` upper case goes. Training is a pure function of the
captions (as a multiset) and the config.

`encode_with_dropout` leaves out merges at random (BPE dropout, Provilkov et al. 2020; Ramesh et al. 2021 trained with
10 %), so that a model sees words in many cuts. The library's own dropout takes no seed, hence the few lines here.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.config.base import parse_config
from pipeline.config.text_tokenizer import TextTokenizerConfig
from pipeline.core.atomic_io import expect_files, read_json, write_atomic, write_json
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import torch

PAD_ID = 0
_PAD = "[PAD]"
_MOST_CLASSES = 65_535
_NUMBER = re.compile("[0-9]+")


class TextTokenizer:
    """Captions to ids in a fixed window of `text_length`, and back; id 0 is the pad and nothing else."""

    def __init__(self, tokenizer: Tokenizer, config: TextTokenizerConfig) -> None:
        # A caption that spells "[PAD]" is text like any other.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.config = config

    @property
    def vocab_size(self) -> int:
        """How many ids there are; at most the config's, fewer when the captions hold no more merges."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def text_length(self) -> int:
        """How many ids a caption's window has."""
        return self.config.text_length

    @classmethod
    def train(cls, captions: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
        """Learn the merges (Sennrich et al. 2016). Raises UserError when there are no captions."""
        ordered = sorted(captions)
        if not ordered:
            raise UserError("no captions to train the text tokenizer on: expected at least one in the train split")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = _normalizer(config)
        # The prefix space makes a word the same token at a caption's start as inside it.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[_PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(ordered, trainer)
        return cls(tokenizer, config)

    @classmethod
    def of_classes(cls, captions: Iterable[str], config: TextTokenizerConfig) -> TextTokenizer:
        """Every distinct caption is a class and has one id, in the order of names, of numbers if all are: 0 is 1.

        Its window is one id, and the pad is the null class. `vocab_size` and `text_length` of `config` do not count.

        Raises:
            UserError: there are no captions, or more than 65,535 distinct ones.
        """
        tokenizer = Tokenizer(models.WordLevel({_PAD: PAD_ID}))
        tokenizer.normalizer = _normalizer(config)
        names = {tokenizer.normalizer.normalize_str(caption) for caption in captions}
        if not 0 < len(names) <= _MOST_CLASSES:
            raise UserError(
                f"transformer.condition: expected 1 to {_MOST_CLASSES:,} classes, as different captions of the train"
                f" split, found {len(names):,}: captions that say what an image shows need condition=text"
            )
        in_order = sorted(names)  # "01" before "1", which are one number
        if all(_NUMBER.fullmatch(name) for name in names):
            in_order.sort(key=int)
        tokenizer.model = models.WordLevel({name: number for number, name in enumerate([_PAD, *in_order])})
        return cls(tokenizer, config.model_copy(update={"text_length": 1}))

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, in the order of their ids from 1 on; None: captions are text."""
        if not isinstance(self._tokenizer.model, models.WordLevel):
            return None
        return sorted(self.ids, key=lambda name: self.ids[name])[1:]

    def labels(self, captions: Sequence[str]) -> list[int] | None:
        """The number of each caption's class, from 0 on in the order of `classes`; None: captions are text.

        Raises:
            UserError: a caption is none of the classes.
        """
        return None if self.classes is None else (self.encode(captions)[:, 0] - 1).tolist()

    def check(self, captions: Sequence[str]) -> None:
        """Raises UserError if captions are classes, and one of these is none of them."""
        if not isinstance(self._tokenizer.model, models.WordLevel):
            return
        for caption in captions:
            name = self._tokenizer.normalizer.normalize_str(caption)
            if self.ids.get(name, PAD_ID) == PAD_ID:
                near = difflib.get_close_matches(name, self.ids, n=1, cutoff=0)
                raise UserError(
                    f"expected the name of one of the {len(self.ids) - 1} classes that the model was trained on, found"
                    f" '{caption}'; the nearest is '{near[0]}'"
                )

    def encode(self, captions: Sequence[str]) -> torch.Tensor:
        """int64 [n, text_length]; a longer caption is cut (see `token_counts`), a shorter one padded with 0.

        Raises:
            UserError: of classes, a caption is none of them.
        """
        import torch

        self.check(captions)
        pads = [PAD_ID] * self.text_length
        rows = [(encoding.ids + pads)[: self.text_length] for encoding in self._tokenizer.encode_batch(list(captions))]
        return torch.tensor(rows, dtype=torch.int64).view(len(captions), self.text_length)

    def encode_with_dropout(self, caption: str, dropout: float, rng: random.Random) -> list[int]:
        """The window of one caption, `text_length` ids, with each merge left out with probability `dropout`.

        A pure function of its arguments; at 0 the same as `encode`.
        """
        normalized = self._tokenizer.normalizer.normalize_str(caption)
        words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]
        ids = [self.ids[part] for word in words for part in _merged(word, self._ranks, dropout, rng)]
        return (ids + [PAD_ID] * self.text_length)[: self.text_length]

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[Tokenizer, TextTokenizerConfig]]:
        return TextTokenizer, (self._tokenizer, self.config)

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token, as the tokenizer spells it."""
        return dict(self._tokenizer.get_vocab())

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        """The rank of each merge: merges in the order in which they were learnt."""
        merges = json.loads(self._tokenizer.to_str())["model"]["merges"]
        return {(left, right): rank for rank, (left, right) in enumerate(merges)}

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """The tokens of each caption before cutting; above `text_length` means that `encode` cuts it."""
        self.check(captions)
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(captions))]

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """The (normalised) caption of one row of ids; pads are left out."""
        kept = [int(i) for i in ids if int(i) != PAD_ID]
        return str(self._tokenizer.decode(kept)).removeprefix(" ")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json (Hugging Face format) and config.json."""
        directory = Path(directory)
        write_atomic(directory / "tokenizer.json", self._tokenizer.to_str(pretty=True))
        write_json(directory / "config.json", self.config.model_dump(mode="json"))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> TextTokenizer:
        """The tokenizer of a folder. Raises UserError when one of its two files is missing or damaged."""
        directory = Path(directory)
        expect_files(directory, "text-tokenizer", "tokenizer.json", "config.json")
        config_path = directory / "config.json"
        config = parse_config(TextTokenizerConfig, read_json(config_path), where=str(config_path))
        try:
            tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception on a damaged file
            raise UserError(
                f"{directory}/tokenizer.json is damaged ({error}); run the text-tokenizer stage again"
            ) from error
        return cls(tokenizer, config)


def _normalizer(config: TextTokenizerConfig) -> normalizers.Normalizer:
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence(steps + [normalizers.Lowercase()] * config.lowercase)


@dataclass(frozen=True)
class EncodeWithDropout:
    """`encode_with_dropout` of one tokenizer and one `dropout`, to be sent to other processes."""

    tokenizer: TextTokenizer
    dropout: float

    def __call__(self, caption: str, rng: random.Random) -> list[int]:
        return self.tokenizer.encode_with_dropout(caption, self.dropout, rng)


def _merged(word: str, ranks: dict[tuple[str, str], int], dropout: float, rng: random.Random) -> list[str]:
    """The parts of a word (Provilkov et al. 2020, algorithm 1).

    Again and again the earliest of the merges that dropout leaves, until it leaves none.
    """
    parts = list(word)
    while True:
        known = [(ranks[pair], position) for position, pair in enumerate(pairwise(parts)) if pair in ranks]
        left = [merge for merge in known if rng.random() >= dropout] if dropout else known
        if not left:
            return parts
        _, position = min(left)
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
