"""What is in the world: shapes, colors, sizes, relations, and which combinations no training ever shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {  # RGB; far apart, so that a tokenizer's blur confuses none
    "red": (222, 36, 48),
    "yellow": (250, 200, 20),
    "green": (40, 160, 60),
    "blue": (40, 90, 220),
    "purple": (140, 50, 170),
    "black": (28, 28, 32),
}
SIZES = {"small": 0.22, "large": 0.38}  # side of the square around it, as a share of the image's side
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # direction, y downward
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MOST = 4  # things in a scene
APART = 0.1  # how far beyond another thing's center one has to be to count as left of it, as a share of the side

# What training never sees, in any scene. Every shape, color, number and relation occurs in others.
HELD_OUT_COLORS = frozenset(
    {
        ("red", "star"), ("yellow", "cross"), ("green", "circle"),
        ("blue", "triangle"), ("purple", "square"), ("black", "star"),
    }
)  # fmt: skip
HELD_OUT_PAIRS = frozenset({frozenset({"circle", "cross"}), frozenset({"square", "star"})})
HELD_OUT_COUNTS = frozenset({(2, "cross"), (3, "square"), (4, "triangle")})
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "left of", "triangle"), ("triangle", "left of", "square"), ("star", "left of", "circle"),
        ("square", "above", "circle"), ("star", "above", "triangle"), ("cross", "above", "square"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape. `x` and `y`: its center, as shares of the image's side, y downward."""

    shape: str
    color: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What an image shows, on white."""

    things: tuple[Thing, ...]


def stands(first: Thing, relation: str, second: Thing) -> bool:
    """Whether `first` is clearly left of (right of, above, below) `second`."""
    right, down = RELATIONS[relation]
    return (first.x - second.x) * right + (first.y - second.y) * down > APART


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination that training must never see."""
    things = scene.things
    if any((thing.color, thing.shape) in HELD_OUT_COLORS for thing in things):
        return True
    counts = Counter(thing.shape for thing in things)
    if any((number, shape) in HELD_OUT_COUNTS for shape, number in counts.items()):
        return True
    return any(_is_held_out_pair(first, second) for first, second in permutations(things, 2))


def held_out_relation(first: str, relation: str, second: str) -> bool:
    """Whether two shapes in this relation are held out, from whichever side it is said."""
    return (first, relation, second) in HELD_OUT_RELATIONS or (second, OPPOSITE[relation], first) in HELD_OUT_RELATIONS


def _is_held_out_pair(first: Thing, second: Thing) -> bool:
    if frozenset({first.shape, second.shape}) in HELD_OUT_PAIRS:
        return True
    return any(
        stands(first, relation, second) and held_out_relation(first.shape, relation, second.shape)
        for relation in RELATIONS
    )


def overlap(things: tuple[Thing, ...], gap: float) -> bool:
    """Whether the squares around any two come closer than `gap`, as a share of the side."""
    return any(_close(first, second, gap) for first, second in _pairs(things))


def _close(first: Thing, second: Thing, gap: float) -> bool:
    reach = (SIZES[first.size] + SIZES[second.size]) / 2 + gap
    return abs(first.x - second.x) < reach and abs(first.y - second.y) < reach


def _pairs(things: tuple[Thing, ...]) -> Iterator[tuple[Thing, Thing]]:
    for index, first in enumerate(things):
        for second in things[index + 1 :]:
            yield first, second
