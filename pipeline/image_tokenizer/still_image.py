"""What the layers in time of a video's tokenizer do to an image: those of Emu3 (Wang et al. 2024), as layers in space.

Its tokenizer takes an image as T equal frames, which become one grid of codes, and of what the codes decode to it keeps
the first frame. Convolutions in time see two frames before theirs, and zeros before the first. So all that an image
needs of them are convolutions in space, of the sums of their kernels in time: pretrained/still_frame.py makes these.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FrameBlock(nn.Module):
    """[B,C,h,w] -> [B,C,h,w], of a single frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Each channel's norm, with the fixed statistics of a batch norm, is a factor and a summand.
        self.norm1, self.norm2 = (nn.Conv2d(width, width, 1, groups=width) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x_BChw: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BChw)))
        out: Tensor = x_BChw + self.conv2(F.silu(self.norm2(h)))
        return out


class StillImage(nn.Module):
    """Behind the encoder: `frames` equal frames become one, [B,C,h,w] -> [B,C,h,w], each convolution half of them.

    Frames that differ stand side by side as channels.
    """

    def __init__(self, width: int, frames: int, blocks: int) -> None:
        super().__init__()
        self.convs, made = nn.ModuleList(), 1  # frames that differ
        while frames > 1:
            frames //= 2
            self.convs.append(nn.Conv2d(made * width, frames * width, 3, padding=1))
            made = frames
        self.blocks = nn.ModuleList(FrameBlock(width) for _ in range(blocks))

    def forward(self, x_BChw: Tensor) -> Tensor:
        for conv in self.convs:
            x_BChw = F.silu(conv(x_BChw))
        for block in self.blocks:
            x_BChw = block(x_BChw)
        return x_BChw


class FirstFrame(nn.Module):
    """Before the decoder: the first of `frames` frames that one becomes, [B,C,h,w] -> [B,C,h,w]."""

    def __init__(self, width: int, frames: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FrameBlock(width) for _ in range(blocks))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(frames.bit_length() - 1))

    def forward(self, x_BChw: Tensor) -> Tensor:
        for block in self.blocks:
            x_BChw = block(x_BChw)
        for conv in self.convs:
            x_BChw = F.silu(conv(x_BChw))
        return x_BChw
