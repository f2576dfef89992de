"""What tuning learns from: images that the model draws as it is, group by group, with their rewards.

    rollouts = Rollouts(policy, start, decode, reward, config, precision, seed)
    batch = rollouts.draw(text_ids, captions, first=1024)      # group_size images of each of these prompts

Image j of the prompt at position p of the training is drawn from (seed, p, j), with the weights of that step: so a
resumed training draws what an undisturbed one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import unwrap

import torch
from PIL import Image
from torch import Tensor

from pipeline.config.generate import SamplingConfig
from pipeline.config.training import Precision
from pipeline.config.tune import TuneConfig
from pipeline.core import watchdog
from pipeline.core.seeds import hash64
from pipeline.sampling.decode import candidate_uniforms, draw_codes, numbers_per_image
from pipeline.sampling.packed import packed
from pipeline.transformer.model import Transformer
from pipeline.tuning.objective import advantages, log_probabilities
from pipeline.tuning.rewards import Reward


class Rollouts:
    """Draws groups of images and judges them."""

    def __init__(
        self,
        policy: Transformer,
        start: Transformer,
        decode: Callable[[Tensor], list[Image.Image]],
        reward: Reward,
        config: TuneConfig,
        precision: Precision,
        seed: int,
    ) -> None:
        """
        Args:
            policy: the model in training, whose weights change between calls.
            start: what tuning began with, on the same device.
            decode: codes [B, N] to images.
            precision: that the training computes in.
        """
        self.policy, self.start, self.decode, self.reward, self.config = policy, start, decode, reward, config
        self._precision, self._seed = precision, hash64("tune", seed)

    @torch.no_grad()
    def draw(self, text_PT: Tensor, captions: Sequence[str], first: int) -> dict[str, Tensor]:
        """The batch of `GroupRelativeObjective.forward`: `group_size` images of each prompt, beside each other.

        `first`: the position of the first prompt in the training.
        """
        group, device = self.config.group_size, self.policy.head.weight.device
        text_BT = text_PT.to(device).repeat_interleave(group, dim=0)
        numbers = [(first + prompt, j) for prompt in range(len(captions)) for j in range(group)]
        codes_BN = self.codes(text_BT, numbers)
        images = self.decode(codes_BN)
        rewards = self.reward(images, [caption for caption in captions for _ in range(group)])
        reward_B = torch.tensor(rewards, dtype=torch.float32, device=device)
        with self._arithmetic(device):
            start_Bn = self._in_parts(self.start, text_BT, codes_BN)
        advantage_B = advantages(reward_B.view(-1, group)).flatten()
        return {"text": text_BT, "codes": codes_BN, "advantage": advantage_B, "reward": reward_B, "start": start_Bn}

    @torch.no_grad()
    def codes(self, text_BT: Tensor, numbers: Sequence[tuple[int, int]]) -> Tensor:
        """The codes [B, N] of images, one for each row of text, drawn from their `numbers`: prompt and image."""
        sampling = SamplingConfig(temperature=self.config.temperature)
        self.policy.eval()
        _ = self.policy.tables  # made here, where autograd may keep them
        model, count = packed(self.policy), numbers_per_image(self.policy)
        found = []
        for begin in range(0, len(numbers), self.config.draw_at_once):
            watchdog.beat()
            part = slice(begin, begin + self.config.draw_at_once)
            uniforms = torch.stack([candidate_uniforms(self._seed, prompt, j, count) for prompt, j in numbers[part]])
            rows = torch.arange(len(uniforms), device=text_BT.device)
            # Not in inference mode, whose tensors a training cannot keep.
            found.append(unwrap(draw_codes)(model, text_BT[part], rows, uniforms.to(text_BT.device), sampling))
        return torch.cat(found)

    def blank(self, prompts: int) -> dict[str, Tensor]:
        """A batch of which only shapes count."""
        layout, rows = self.policy.layout, prompts * self.config.group_size
        codes_BN = torch.zeros(rows, layout.image_length, dtype=torch.int64)
        nothing_B, targets = torch.zeros(rows), self.policy.targets(codes_BN)
        start_Bn = torch.zeros(rows, sum(target.shape[1] for target in targets))
        text_BT = torch.zeros(rows, layout.text_length, dtype=torch.int64)
        return {"text": text_BT, "codes": codes_BN, "advantage": nothing_B, "reward": nothing_B, "start": start_Bn}

    def _in_parts(self, model: Transformer, text_BT: Tensor, codes_BN: Tensor) -> Tensor:
        at_once, temperature = self.config.draw_at_once, self.config.temperature
        pairs = zip(text_BT.split(at_once), codes_BN.split(at_once), strict=True)
        return torch.cat([log_probabilities(model, text, codes, temperature) for text, codes in pairs])

    def _arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """As the training computes, so that rounding is no divergence."""
        autocast = self._precision == "bf16-autocast"
        return torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
