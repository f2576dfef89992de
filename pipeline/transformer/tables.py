"""Constants that follow from a model's layout and shape, made at first use on its device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from pipeline.config.transformer import TransformerShape
from pipeline.transformer.attention_patterns import Pattern, dense_mask, mask_mod
from pipeline.transformer.layout import Layout
from pipeline.transformer.rotary import rotary_angles


class Tables:
    """Offsets, rotary angles and masks of one model on one device.

    No buffers: never saved, never cast, the same however the weights came. S positions, T of text, N codes, K head
    width.
    """

    @torch.inference_mode(False)  # training could not use tensors that inference mode made
    def __init__(self, layout: Layout, shape: TransformerShape, device: torch.device) -> None:
        self.layout, self.shape, self.device = layout, shape, device
        sizes = [level.positions for level in layout.levels]
        offsets = [torch.full((n,), o) for n, o in zip(sizes, layout.level_offsets, strict=True)]
        self.code_offsets = torch.cat(offsets).to(device)  # [N]
        self.pad_ids = layout.pad_offset + torch.arange(layout.text_length, device=device)  # [T]
        self._cosine_sine: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._allowed: dict[Pattern, Tensor] = {}
        self._bias: dict[tuple[Pattern, torch.dtype], Tensor] = {}
        self._block_masks: dict[Pattern, BlockMask] = {}

    @torch.inference_mode(False)
    def rotary(self, start: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles of positions start .. end - 1: [S, K / 2] each."""
        if dtype not in self._cosine_sine:
            angles = rotary_angles(self.layout, self.shape.head_width, self.device)
            self._cosine_sine[dtype] = (angles.cos().to(dtype), angles.sin().to(dtype))
        cosine, sine = self._cosine_sine[dtype]
        return cosine[start:end], sine[start:end]

    @torch.inference_mode(False)
    def allowed(self, pattern: Pattern) -> Tensor:
        """The dense mask, bool [S, S]: row sees column."""
        if pattern not in self._allowed:
            self._allowed[pattern] = dense_mask(pattern, self.layout, self.shape.conv_kernel, self.device)
        return self._allowed[pattern]

    @torch.inference_mode(False)
    def bias(self, pattern: Pattern, dtype: torch.dtype) -> Tensor:
        """The mask to add to scores, [S, S]: 0 where row sees column, else minus infinity."""
        if (pattern, dtype) not in self._bias:
            zero = torch.zeros((), dtype=dtype, device=self.device)
            self._bias[pattern, dtype] = torch.where(self.allowed(pattern), zero, float("-inf"))
        return self._bias[pattern, dtype]

    @torch.inference_mode(False)
    def block_mask(self, pattern: Pattern) -> BlockMask:
        """FlexAttention's form of the mask: which blocks of 128 x 128 positions hold anything at all."""
        if pattern not in self._block_masks:
            mask = mask_mod(pattern, self.layout, self.shape.conv_kernel, self.device)
            length = self.layout.length
            self._block_masks[pattern] = create_block_mask(mask, None, None, length, length, device=str(self.device))
        return self._block_masks[pattern]
