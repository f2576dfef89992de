"""Images that all ranks of a training generate, each from some of the prompts, with the model as it lies there.

    images = generate_on_all_ranks(pipeline, [training_captions, validation_captions], seed, in_step=False)

At ZeRO-3 no rank has the whole model: `in_step`, each gathers a block's weights where the others do, and gives them
back after it. That is what a training step does, too, but once for each code: at that stage sample images are dear.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import unwrap

import torch
from PIL import Image
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.core import distributed
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.pipeline import Pipeline
from pipeline.training.stopping import stop_if_asked

_CODES_BETWEEN_LOOKS = 16
_Wanted = tuple[int, int]  # group of prompts, and the prompt's number in it


def generate_on_all_ranks(
    pipeline: Pipeline, groups: Sequence[Sequence[str]], seed: int, in_step: bool
) -> list[list[Image.Image]]:
    """An image of each prompt, group by group, on every rank. That of a group's prompt i is drawn from (seed, i).

    Args:
        in_step: the model's blocks are sharded; what is outside of them is there (`Engine.gathered_outside_blocks`).

    Raises:
        EvaluationStopped: a rank was asked to stop, on every rank. They look before each group's images, which are a
            batch, and in step before every sixteenth code.
    """
    wanted = [(group, i) for group, prompts in enumerate(groups) for i in range(len(prompts))]
    rank, ranks = distributed.rank(), distributed.world_size()
    own = wanted[len(wanted) * rank // ranks : len(wanted) * (rank + 1) // ranks]
    if in_step:
        codes_BN = _codes_in_step(pipeline, groups, own or wanted[-1:], seed)
        images = pipeline.decode(codes_BN)[: len(own)]
    else:
        images = _generate(pipeline, groups, own, seed)
    found: dict[_Wanted, Image.Image] = {}
    for of_rank in distributed.all_gather_objects(dict(zip(own, images, strict=True))):
        found |= of_rank
    return [[found[group, i] for i in range(len(prompts))] for group, prompts in enumerate(groups)]


def _generate(
    pipeline: Pipeline, groups: Sequence[Sequence[str]], own: Sequence[_Wanted], seed: int
) -> list[Image.Image]:
    images: list[Image.Image] = []
    for group, prompts in enumerate(groups):
        stop_if_asked()
        if numbers := [i for of_group, i in own if of_group == group]:
            mine = prompts[numbers[0] : numbers[-1] + 1]
            images += [one.image for one in pipeline.generate(mine, seed=seed, first_prompt=numbers[0])]
    return images


def _codes_in_step(pipeline: Pipeline, groups: Sequence[Sequence[str]], own: Sequence[_Wanted], seed: int) -> Tensor:
    """Codes [B, N] of this rank's prompts, in one batch: as many calls of the model as every other rank makes."""
    model = pipeline.transformer
    device, count = model.head.weight.device, numbers_per_image(model)

    def look(drawn: int, _: Tensor) -> None:
        if drawn % _CODES_BETWEEN_LOOKS == 0:
            stop_if_asked()

    # Not in inference mode, where the weights that are gathered, and their parameters with them, would lose autograd.
    draw = unwrap(draw_codes)
    codes_BN: Tensor = draw(
        model,
        pipeline.text_tokenizer.encode([groups[group][i] for group, i in own]).to(device),
        torch.arange(len(own), device=device),
        torch.stack([candidate_uniforms(seed, i, 0, count) for _, i in own]).to(device),
        SamplingConfig(),
        on_code=look,
        step="model",
    )
    return codes_BN
