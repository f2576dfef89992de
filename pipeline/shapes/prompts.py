"""Captions: what is asked for, how it is said in several ways, and what a text asks for.

A prompt is of one of six tasks, those of GenEval (Ghosh et al. 2023, section 3): one object, two objects, counting,
colors, position, attribute binding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from random import Random

from pipeline.core.errors import UserError
from pipeline.shapes.scene import (
    COLORS,
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    MOST,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    held_out_relation,
)

TASKS = ("one object", "two objects", "counting", "colors", "position", "attribute binding")
_NUMBERS = {1: ("a", "one"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_WORDS = {word: number for number, words in _NUMBERS.items() for word in words} | {"an": 1}
_SAID = {  # each relation in several ways
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_TOGETHER = ("and", "with", "together with")
_OPENINGS = ("", "", "", "an image of ", "an image with ")
_PLURALS = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
_NOUN = re.compile(
    rf"(?P<number>{'|'.join(_WORDS)}) (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<shape>{'|'.join([*_PLURALS.values(), *SHAPES])})\b"
    rf"(?: that (?:is|are) (?P<after>{'|'.join(COLORS)}))?"
)


@dataclass(frozen=True)
class Wanted:
    """So many things of a kind; None: any."""

    shape: str
    number: int = 1
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What an image has to show: these things and no others; with a relation, the first stands so to the second."""

    things: tuple[Wanted, ...]
    relation: str | None = None

    @property
    def task(self) -> str:
        """Which of TASKS it is of."""
        if self.relation:
            return "position"
        if len(self.things) == 2:
            return "attribute binding" if all(thing.color for thing in self.things) else "two objects"
        if self.things[0].number > 1:
            return "counting"
        return "colors" if self.things[0].color else "one object"

    @property
    def held_out(self) -> bool:
        """Whether it asks for a combination that training never sees."""
        shapes = frozenset(thing.shape for thing in self.things)
        if any((t.color, t.shape) in HELD_OUT_COLORS or (t.number, t.shape) in HELD_OUT_COUNTS for t in self.things):
            return True
        if self.relation and held_out_relation(self.things[0].shape, self.relation, self.things[1].shape):
            return True
        return shapes in HELD_OUT_PAIRS

    def say(self, random: Random) -> str:
        """It in words, one way of several."""
        opening, things = random.choice(_OPENINGS), list(self.things)
        if self.relation is None:
            random.shuffle(things)
            nouns = [_noun(thing, random) for thing in things]
            return opening + f" {random.choice(_TOGETHER)} ".join(nouns)
        relation = self.relation
        if random.random() < 0.5:
            things, relation = things[::-1], OPPOSITE[relation]
        first, second = (_noun(thing, random) for thing in things)
        return f"{opening}{first} {random.choice(_SAID[relation])} {second}"


def read(text: str) -> Prompt:
    """What a text of this grammar asks for.

    Raises:
        UserError: it names no shape, or says something that the grammar has not.
    """
    found = list(_NOUN.finditer(text))
    things = tuple(_wanted(match) for match in found)
    between = text[found[0].end() : found[1].start()].strip() if len(found) == 2 else ""
    relation = next((name for name, ways in _SAID.items() if between in ways), None)
    ends = (text[: found[0].start()], text[found[-1].end() :]) if found else ("?", "")
    if (
        not (1 <= len(found) <= 2)
        or ends[0] not in _OPENINGS
        or ends[1]
        or (between and not relation and between not in _TOGETHER)
    ):
        raise UserError(
            f"expected one or two of the shapes {', '.join(SHAPES)}, such as 'two red stars' or 'a circle above a blue"
            f" square', found '{text}'"
        )
    return Prompt(things, relation)


def prompts(task: str) -> Iterator[Prompt]:
    """Every prompt of a task, seen and held out; sizes are left to the captions."""
    if task == "one object":
        yield from (Prompt((Wanted(shape),)) for shape in SHAPES)
    elif task == "colors":
        yield from (Prompt((Wanted(shape, color=color),)) for shape in SHAPES for color in COLORS)
    elif task == "counting":
        yield from (Prompt((Wanted(shape, number),)) for shape in SHAPES for number in range(2, MOST + 1))
    elif task == "two objects":
        yield from (Prompt((Wanted(first), Wanted(second))) for first, second in combinations(SHAPES, 2))
    elif task == "position":
        # What is said from the other side is the same prompt.
        yield from (
            Prompt((Wanted(first), Wanted(second)), relation)
            for first, second in permutations(SHAPES, 2)
            for relation in list(RELATIONS)[::2]
        )
    else:
        yield from (
            Prompt((Wanted(first, color=color), Wanted(second, color=other)))
            for first, second in combinations(SHAPES, 2)
            for color, other in permutations(COLORS, 2)
        )


def _noun(thing: Wanted, random: Random) -> str:
    words = [random.choice(_NUMBERS[thing.number]), thing.size, thing.color, _named(thing)]
    if thing.color and random.random() < 0.15:
        verb = "is" if thing.number == 1 else "are"
        words = [words[0], thing.size, _named(thing), f"that {verb} {thing.color}"]
    return " ".join(word for word in words if word)


def _named(thing: Wanted) -> str:
    return thing.shape if thing.number == 1 else _PLURALS[thing.shape]


def _wanted(match: re.Match[str]) -> Wanted:
    shape = next(shape for shape in SHAPES if match["shape"] in (shape, _PLURALS[shape]))
    return Wanted(shape, _WORDS[match["number"]], match["color"] or match["after"], match["size"])
