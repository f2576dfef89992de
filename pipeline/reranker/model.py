"""A small CLIP (Radford et al. 2021): two towers whose embeddings are near where image and caption belong together.

Shapes: B batch, P patches, T text positions, D width, E dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.base import parse_config
from pipeline.config.reranker import TowerConfig
from pipeline.core.errors import UserError
from pipeline.core.image_size import ImageSize, height_width, told
from pipeline.core.image_size import image_size as one_form
from pipeline.core.objective import Exported, Objective, ParameterGroup
from pipeline.core.pretrained import load_model, save_model
from pipeline.text_tokenizer.bpe import PAD_ID

_INIT_STD = 0.02
_MAX_LOG_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


class TwoTowers(nn.Module):
    """An image tower and a text tower, transformers both, that embed into one space of E dimensions.

    The image tower sees patches as in a vision transformer (Dosovitskiy et al. 2021, section 3.1); both average over
    positions instead of reading one of them. Cosines of unit vectors say how well image and caption fit.
    """

    def __init__(self, config: TowerConfig, image_size: ImageSize, text_length: int, text_vocab_size: int) -> None:
        super().__init__()
        height, width = height_width(image_size)
        if height % config.patch_size or width % config.patch_size:
            raise UserError(
                f"reranker.model.patch_size: expected a divisor of prepare.image_size {told(image_size)}, found"
                f" {config.patch_size}"
            )
        self.config, self.image_size = config, one_form(image_size)
        self.text_length, self.text_vocab_size = text_length, text_vocab_size
        self.patches = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.image_position = nn.Parameter(
            torch.empty(height // config.patch_size * (width // config.patch_size), config.width)
        )
        self.embedding = nn.Embedding(text_vocab_size, config.width)
        self.text_position = nn.Parameter(torch.empty(text_length, config.width))
        self.image_tower, self.text_tower = _tower(config), _tower(config)
        self.image_out = nn.Linear(config.width, config.dimensions, bias=False)
        self.text_out = nn.Linear(config.width, config.dimensions, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for weight in (self.image_position, self.text_position, self.embedding.weight):
            nn.init.normal_(weight, std=_INIT_STD)

    def embed_images(self, images: Tensor) -> Tensor:
        """Images, uint8 or float in [0, 1], [B, 3, H, W] -> unit vectors, float32 [B, E]."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        x_BPD = self.patches(pixels * 2 - 1).flatten(2).transpose(1, 2) + self.image_position
        return F.normalize(self.image_out(self.image_tower(x_BPD).mean(dim=1)).float(), dim=-1)

    def embed_captions(self, text_BT: Tensor) -> Tensor:
        """Ids of the text tokenizer (0: pad), int64 [B, T] -> unit vectors, float32 [B, E]."""
        pads_BT = text_BT == PAD_ID
        pads_BT = pads_BT & ~pads_BT.all(dim=1, keepdim=True)  # a caption of nothing but pads attends to them
        x_BTD = self.text_tower(self.embedding(text_BT) + self.text_position, src_key_padding_mask=pads_BT)
        kept_BT1 = (~pads_BT)[..., None].to(x_BTD.dtype)
        return F.normalize(self.text_out((x_BTD * kept_BT1).sum(1) / kept_BT1.sum(1)).float(), dim=-1)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes model.safetensors and config.json."""
        save_model(self, self.exported_config(), directory)

    def exported_config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "kind": "towers",
            "model": self.config.model_dump(),
            "image_size": self.image_size,
            "text_length": self.text_length,
            "text_vocab_size": self.text_vocab_size,
        }

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> TwoTowers:
        """Load what `save_pretrained` wrote: in float32, on the CPU, in eval mode.

        Raises:
            UserError: files are missing or damaged, or do not belong together.
        """

        def build(config: dict[str, Any], where: str) -> TwoTowers:
            shape = parse_config(TowerConfig, config["model"], where)
            return cls(shape, config["image_size"], config["text_length"], config["text_vocab_size"])

        return load_model(directory, "reranker", ("model", "image_size", "text_length", "text_vocab_size"), build)


class ContrastiveObjective(Objective):
    """InfoNCE (van den Oord et al. 2018) in both directions: each image finds its caption in the batch, and vice versa.

    As Radford et al. 2021, figure 3; here the negatives are those of one process and micro-batch, and equal captions
    are no negatives of each other.
    """

    def __init__(self, towers: TwoTowers) -> None:
        super().__init__()
        self.towers = towers

    def exported(self) -> Exported:
        return Exported("towers.", self.towers.exported_config())

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss in nats, and metrics, of `batch`: "images" uint8 [B, 3, H, W], "text" int64 [B, T]."""
        text = batch["text"]
        images, captions = self.towers.embed_images(batch["images"]), self.towers.embed_captions(text)
        scale = self.towers.log_scale.clamp(max=_MAX_LOG_SCALE).exp()
        logits = scale * images @ captions.T
        # Images with the same caption are all right answers.
        same = (text[:, None] == text[None]).all(-1).float()
        targets = same / same.sum(dim=1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        with torch.no_grad():
            hits = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return loss, {"accuracy": hits, "scale": scale.detach()}

    def parameter_groups(self) -> list[ParameterGroup]:
        positions = [self.towers.image_position, self.towers.text_position]
        return [ParameterGroup(list(self.parameters()), undecayed=positions)]

    def blocks(self) -> list[nn.Module]:
        return [*self.towers.image_tower.layers, *self.towers.text_tower.layers]


def _tower(config: TowerConfig) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, 4 * config.width, config.dropout, "gelu", batch_first=True, norm_first=True
    )
    norm = nn.LayerNorm(config.width)
    tower = nn.TransformerEncoder(layer, config.layers, norm, enable_nested_tensor=False)
    for parameter in tower.parameters():  # copies of one layer would all start the same
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return tower
