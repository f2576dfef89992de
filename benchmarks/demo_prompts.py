"""Draw the demo's new prompts: words that training knows, together as no image of it has them.

    python -m benchmarks.demo_prompts            # those of configs/openmoji.yaml: seed 0, which nobody chose by results

Eight of a color and a thing, four of two things and four without color; things are OpenMoji's food, plants, animals and
vehicles of the training split that have a color of their own.
"""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.config.pipeline import load_pipeline
from pipeline.config.prepare import OpenMojiSource
from pipeline.core.seeds import random_of
from pipeline.data.sources.openmoji import OpenMoji
from pipeline.data.sources.openmoji_variants import PALETTE, is_thing, recolored, without_color, without_colors
from pipeline.data.splits import split_of

CONFIG = Path(__file__).parents[1] / "configs" / "openmoji.yaml"


def draw_prompts(seed: int, config: Path = CONFIG) -> list[str]:
    """16 prompts for the config's model, a function of (seed, the config's source)."""
    prepare = load_pipeline(config).prepare
    assert isinstance(prepare.source, OpenMojiSource)
    source = OpenMoji(prepare.source, prepare.image_size)
    seen = {item[1] for item in source.items}
    things = [
        name
        for stem, name in source.named
        if is_thing(stem)
        and split_of(stem, None, prepare.validation_fraction) == "train"
        and recolored(source.svg(stem), "red") is not None
        and without_colors(source.svg(stem)) is not None
    ]
    random = random_of("demo prompts", seed)

    def unseen(form: str, number: int) -> list[str]:
        found: list[str] = []
        while len(found) < number:
            color, (one, other) = random.choice(list(PALETTE)), random.sample(things, 2)
            prompt = form.format(color=color, bare=without_color(one), one=one, other=other)
            if prompt not in seen and prompt not in found:
                found.append(prompt)
        return found

    return [*unseen("{color} {bare}", 8), *unseen("{one} and {other}", 4), *unseen("grayscale {bare}", 4)]


@click.command()
@click.option("--seed", default=0, show_default=True)
def main(seed: int) -> None:
    for prompt in draw_prompts(seed):
        click.echo(f"    - {prompt}")


if __name__ == "__main__":
    main()
