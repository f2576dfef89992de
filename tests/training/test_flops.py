"""What a training computes, and the rate that it is compared with."""

from __future__ import annotations

import pytest
import torch

from pipeline.image_tokenizer.base import build
from pipeline.training.flops import flops_of, matmul_flops_per_s

WIDTH = 32
CODEBOOK = {"kind": "gradient", "codebook_size": 32, "code_width": 8}
# two layers of attention each, over patches of 4 pixels on a side
ATTENTIVE = {
    "vit": {"kind": "vit", "patch_size": 4, "width": WIDTH, "layers": 1, "heads": 2, "quantizer": CODEBOOK},
    "vqgan": {
        "kind": "vqgan",
        "channels": WIDTH,
        "multipliers": [1, 1, 1],
        "blocks": 1,
        "attention": [],
        "quantizer": CODEBOOK,
    },
}


@pytest.mark.parametrize("model", ATTENTIVE.values(), ids=ATTENTIVE)
def test_the_attention_of_an_image_tokenizer_is_counted(model: dict[str, object]) -> None:
    one = flops_of(build(model, 32).objective(), {"images": torch.zeros(1, 3, 32, 32).byte()}, "fp32")
    four = flops_of(build(model, 16).objective(), {"images": torch.zeros(4, 3, 16, 16).byte()}, "fp32")
    assert one is not None
    assert four is not None
    # the same pixels: what differs are the products of all positions with all positions of an image, two a layer
    assert one - four == 2 * 2 * 2 * WIDTH * (64**2 - 4 * 16**2)


def test_a_machine_too_busy_to_measure_in_time_has_a_rate_all_the_same() -> None:
    assert matmul_flops_per_s("fp32", torch.device("cpu"), seconds=0.0) > 0
