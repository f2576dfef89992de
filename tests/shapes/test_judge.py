"""The judge of the world of shapes: always right about the truth, never taken in by another caption, used to blur."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.config.pipeline import load_pipeline
from pipeline.core.errors import UserError
from pipeline.shapes.drawing import draw
from pipeline.shapes.judge import judge, scores, see
from pipeline.shapes.prompts import TASKS, prompts, read
from pipeline.shapes.scene import RELATIONS, Scene, Thing, is_held_out
from pipeline.shapes.world import sample, scene_of
from tests.launch import ROOT

SAMPLES = [sample(0, number) for number in range(400)]


@pytest.mark.parametrize("side", [48, 64, 128])
def test_every_true_caption_is_right(side: int) -> None:
    found = scores((draw(scene, side), caption) for caption, scene in SAMPLES)
    assert found == dict.fromkeys([*TASKS, "overall"], 1.0)


def test_captions_of_other_images_are_wrong_but_by_chance() -> None:
    captions = [caption for caption, _ in SAMPLES]
    Random(1).shuffle(captions)
    shuffled = scores((draw(scene, 64), caption) for caption, (_, scene) in zip(captions, SAMPLES, strict=True))
    assert shuffled["overall"] < 0.05


def test_blur_and_noise_of_a_tokenizer_change_no_verdict() -> None:
    noise = np.random.default_rng(0)

    def worn(scene: Scene) -> Image.Image:
        pixels = np.asarray(draw(scene, 64).filter(ImageFilter.GaussianBlur(1.0)), dtype=float)
        return Image.fromarray((pixels + noise.normal(0, 10, pixels.shape)).clip(0, 255).astype(np.uint8))

    assert scores((worn(scene), caption) for caption, scene in SAMPLES)["overall"] >= 0.99


def test_what_is_wrong_is_said() -> None:
    circle, square = Thing("circle", "red", "small", 0.25, 0.5), Thing("square", "blue", "large", 0.7, 0.5)
    image = draw(Scene((circle, square)), 64)
    assert judge(image, "a red circle left of a large square").right
    assert judge(image, "a square to the right of a circle").right
    assert judge(image, "a red circle right of a square").why == "expected circle right of square"
    assert judge(image, "a green circle and a square").why == "expected 1 of green circle, found 0"
    assert judge(image, "a red circle").why == "expected 1 things, found 2"
    assert judge(image, "2 circles").why == "expected 2 of circle, found 1"


def test_an_image_of_something_else_shows_nothing_of_the_world() -> None:
    assert see(Image.new("RGB", (64, 64), "white")) == []
    gradient = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    assert not judge(gradient, "a black square").right


def test_things_are_seen_where_they_are() -> None:
    for _, scene in SAMPLES[:100]:
        seen = see(draw(scene, 128))
        for thing in scene.things:
            near = min(seen, key=lambda other: abs(other.x - thing.x) + abs(other.y - thing.y))
            assert replace(near, x=thing.x, y=thing.y) == thing
            assert abs(near.x - thing.x) + abs(near.y - thing.y) < 0.03


@pytest.mark.parametrize("text", ["", "a dog", "a red circle near a square", "a red circle and", "six stars", "red"])
def test_a_text_that_is_not_of_the_grammar_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected one or two of the shapes"):
        read(text)


def test_every_way_of_saying_a_prompt_is_read_as_the_same_prompt() -> None:
    random = Random(0)
    for task in TASKS:
        for prompt in prompts(task):
            for _ in range(5):
                again = read(prompt.say(random))
                assert again.task == task
                assert again.held_out == prompt.held_out
                assert {*again.things} == {*prompt.things}


def test_training_sees_no_held_out_combination_and_every_part_of_one() -> None:
    scenes = [scene for _, scene in (sample(0, number) for number in range(3000))]
    assert not any(map(is_held_out, scenes))
    asked = [prompt for task in TASKS for prompt in prompts(task) if prompt.held_out]
    assert {prompt.task for prompt in asked} == {*TASKS} - {"one object"}
    things = {(thing.shape, thing.color) for scene in scenes for thing in scene.things}
    assert len(things) == 5 * 6 - 6
    said = [read(caption) for caption, _ in (sample(0, number) for number in range(3000))]
    assert {prompt.relation for prompt in said} == {None, *RELATIONS}
    assert {prompt.task for prompt in said} == {*TASKS}


def test_held_out_prompts_can_be_drawn_and_are_judged_right() -> None:
    random = Random(0)
    asked = [prompt for task in TASKS for prompt in prompts(task) if prompt.held_out]
    for prompt in asked:
        assert judge(draw(scene_of(prompt, random, held_out=True), 64), prompt.say(random)).right


@pytest.mark.parametrize("grid", [4, 8])
def test_on_a_grid_every_thing_lies_in_the_middle_of_its_cells_and_is_judged_right(grid: int) -> None:
    samples = [sample(0, number, grid) for number in range(200)]
    assert scores((draw(scene, 48), caption) for caption, scene in samples)["overall"] == 1.0
    things = [thing for _, scene in samples for thing in scene.things]
    small = {thing.x for thing in things if thing.size == "small"}
    first = 1 / 2 if grid == 4 else 1  # cells from the edge to the center of a small thing: it covers 1 of 4, 2 of 8
    assert small == {(first + n) / grid for n in range(grid if grid == 4 else grid - 1)}
    assert not any(is_held_out(scene) for _, scene in samples)


def test_a_sample_is_a_function_of_seed_number_and_grid_alone() -> None:
    assert [sample(3, n, 4) for n in range(5)] == [sample(3, n, 4) for n in (0, 1, 2, 3, 4)]
    assert sample(3, 1, 4) != sample(3, 1, 8)
    assert [sample(3, n) for n in range(5)] == [sample(3, n) for n in (0, 1, 2, 3, 4)]
    assert sample(3, 1) != sample(4, 1)
    caption, scene = sample(0, 0)
    assert draw(scene, 64).tobytes() == draw(scene, 64).tobytes()
    assert read(caption)


def test_the_shipped_config_asks_for_what_training_sees_and_for_what_it_never_sees() -> None:
    generate = load_pipeline(ROOT / "configs" / "shapes.yaml").generate
    assert not any(read(prompt).held_out for prompt in generate.training_prompts)
    assert all(read(prompt).held_out for prompt in generate.new_prompts)
    assert {read(prompt).task for prompt in generate.new_prompts} == {*TASKS} - {"one object"}
