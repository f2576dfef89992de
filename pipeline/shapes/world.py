"""Samples of the world: a caption and a scene that shows it, each a pure function of (seed, number, grid)."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from pipeline.shapes.prompts import TASKS, Prompt, Wanted, prompts
from pipeline.shapes.scene import COLORS, SIZES, Scene, Thing, is_held_out, overlap, stands

VERSION = 1  # of what is drawn for a seed
_GAP = 0.05  # between the squares around two things, as a share of the side
_EDGE = 0.02
_OVER = 0.1  # cells that a thing may hang over the square of cells in whose middle it lies
_SEEN = {task: [prompt for prompt in prompts(task) if not prompt.held_out] for task in TASKS}
# Tasks with more combinations get more of the samples.
_WEIGHTS = {"one object": 1, "two objects": 2, "counting": 3, "colors": 3, "position": 4, "attribute binding": 5}


def sample(seed: int, number: int, grid: int | None = None) -> tuple[str, Scene]:
    """A caption that training may see, and a scene that shows it and nothing held out.

    `grid`: things lie in the middle of cells (large ones of squares of cells) of a grid of so many on a side; None:
    anywhere.
    """
    random = Random(f"shapes {VERSION}, {seed}, {number}")
    task = random.choices(TASKS, [_WEIGHTS[task] for task in TASKS])[0]
    while True:
        prompt = _with_details(random.choice(_SEEN[task]), random)
        if not prompt.held_out:
            break
    return prompt.say(random), scene_of(prompt, random, grid=grid)


def scene_of(prompt: Prompt, random: Random, *, held_out: bool = False, grid: int | None = None) -> Scene:
    """A scene that shows the prompt. `held_out`: it may show what training never sees. `grid`: as `sample` has it."""
    while True:
        things = tuple(thing for wanted in prompt.things for thing in _placed(wanted, random, grid))
        scene = Scene(things)
        if overlap(things, _GAP) or (prompt.relation and not stands(things[0], prompt.relation, things[1])):
            continue
        if held_out or not is_held_out(scene):
            return scene


def _with_details(prompt: Prompt, random: Random) -> Prompt:
    """Say a size here and there, and a color where the task does not ask for it."""
    detailed = []
    for thing in prompt.things:
        size = random.choice([*SIZES]) if thing.number == 1 and random.random() < 0.2 else None
        color = thing.color
        if color is None and random.random() < 0.3 and prompt.task in ("counting", "position"):
            color = random.choice([*COLORS])
        detailed.append(replace(thing, size=size, color=color))
    return Prompt(tuple(detailed), prompt.relation)


def _placed(wanted: Wanted, random: Random, grid: int | None) -> list[Thing]:
    """Things of one color; of several, small ones, or they would not fit."""
    several = wanted.number > 1
    color = wanted.color or random.choice([*COLORS])
    things = []
    for _ in range(wanted.number):
        size = wanted.size or ("small" if several else random.choice([*SIZES]))
        x, y = _place(SIZES[size], random, grid), _place(SIZES[size], random, grid)
        things.append(Thing(wanted.shape, color, size, x, y))
    return things


def _place(size: float, random: Random, grid: int | None) -> float:
    """Where the center of a thing lies along one side."""
    if grid is None:
        edge = size / 2 + _EDGE
        return random.uniform(edge, 1 - edge)
    cells = max(1, math.ceil(size * grid - _OVER))
    return (random.randint(0, grid - cells) + cells / 2) / grid
