"""Config of the transformer: its shape, its loss, its training. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Config, added, operational
from pipeline.config.training import DeepSpeedConfig, TrainingConfig

STYLES: dict[str, dict[str, str | bool]] = {
    "classic": {
        "norm": "layernorm",
        "mlp": "gelu",
        "positions": "learned",
        "attention": "sparse",
        "qk_norm": False,
    },
    "modern": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary", "attention": "full", "qk_norm": True},
}


class TransformerShape(Config):
    """What decides the model's parameters (with the layout); saved in its config.json."""

    layers: int = Field(4, ge=1, le=10_000, description="blocks of attention and MLP")
    width: int = Field(256, ge=8, le=1_000_000, description="channels of the residual stream")
    heads: int = Field(4, ge=1, description="attention heads; must divide width")
    style: Literal["classic", "modern"] | None = Field(
        None, description="sets norm, mlp, positions, attention and qk_norm, unless they are given; see STYLES"
    )
    kv_heads: int | None = Field(
        None, ge=1, description="heads of keys and values, each shared by heads / kv_heads queries; None: heads"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation before each attention and MLP")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="kind of MLP")
    mlp_width: int | None = Field(
        None, ge=8, description="hidden width; None: 4 width, for swiglu 8/3 width in steps of 64"
    )
    positions: Literal["learned", "rotary"] = Field(
        "learned", description="learned: text index, row + column of each level; rotary: row and column turn the heads"
    )
    attention: Literal["full", "sparse"] = Field(
        "full", description="sparse: row, column and convolutional layers in the order of Ramesh et al. 2021"
    )
    conv_kernel: int = Field(11, ge=1, description="side of the convolutional pattern, odd")
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the output of attention and MLP, in training")
    order: Literal["raster", "any", "scale"] = added(
        "raster",
        description="of image codes: raster, row by row; any, learned in random orders, many codes a pass; scale, all"
        " codes of a level in one pass",
    )
    code_groups: int = added(
        1,
        ge=1,
        le=4,
        description="of large codebooks: digits that a code is read and predicted by, one after the other, with rows of"
        " their own in embedding and head; 2 for 2**13 codes and more",
    )
    base_width: int | None = Field(
        None, ge=8, description="muP: the width that learning_rate was found at; None: no transfer between widths"
    )
    base_head_width: int | None = Field(
        None, ge=2, description="muP: the head width that learning_rate was found at; None: this one"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_style(cls, values: object) -> object:
        return {**STYLES.get(str(values.get("style")), {}), **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> TransformerShape:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose heads that divide it")
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; choose a divisor")
        if self.positions == "rotary" and self.head_width % 4:
            raise ValueError(f"rotary positions need width / heads in multiples of 4, found {self.head_width}")
        if self.order != "raster" and self.attention == "sparse":
            raise ValueError(f"order {self.order} needs attention full, found sparse: its patterns are those of rows")
        if self.order == "any" and self.layers < 2:
            raise ValueError(
                f"order any needs at least 2 layers, one that reads and one that asks, found {self.layers}"
            )
        if self.order != "raster" and self.code_groups > 1:
            raise ValueError(
                f"code_groups needs order raster, found {self.order}: leave it out, or set order to raster"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, found {self.conv_kernel}")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        default = max(64, round(self.width * 8 / 3 / 64) * 64) if self.mlp == "swiglu" else 4 * self.width
        return self.mlp_width or default

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by: 1 / sqrt(K); with `base_head_width` 1 / K, equal at the base.

        Yang et al. 2022, section 4. K is the head width.
        """
        base = self.base_head_width or self.head_width
        return float(self.head_width**-0.5 * (base / self.head_width) ** 0.5)

    @property
    def width_ratio(self) -> float:
        """base_width / width: what learning rates of the blocks' matrices and of the head are multiplied by."""
        return (self.base_width or self.width) / self.width


class TransformerConfig(TransformerShape):
    """Section `transformer`: the model, its loss and its training.

    Loss weights as Ramesh et al. 2021, section 2.2: text 1/8, image 7/8.
    """

    condition: Literal["text", "class"] = added(
        "text", description="what captions are: text, or names of classes, of which each is one token"
    )
    text_loss_weight: float = Field(
        0.125, ge=0, description="weight of the cross-entropy of text tokens; not given, 0 with condition class"
    )
    image_loss_weight: float = Field(0.875, gt=0, description="weight of the cross-entropy of image tokens")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over its vocabulary")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log of the softmax's denominator; try 1e-4")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of captions replaced by pads in training; guidance needs some"
    )
    verify: Literal["background", "first"] = operational(
        "background",
        description="compare token arrays with their checksums while training begins, or first",
    )
    bpe_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of BPE merges left out in training; Ramesh et al. 2021: 0.1"
    )
    order_anneal: tuple[int, int] | None = added(
        None,
        description="order any: codes come in raster order until the first of these steps, from the second on in random"
        " orders, between in a growing share of the samples; null: in random orders from the start",
    )
    code_noise: float | None = added(
        None,
        ge=0,
        lt=1,
        description="up to this share of a sample's codes are read as others in training, so that later ones learn to"
        " live with wrong draws, and to go by the caption; null: 0.1 with order scale, else 0",
    )
    init_from: str | None = added(
        None,
        min_length=1,
        description="RUN, EXPORT or FOLDER: start with the weights of the transformer there, as far as they fit;"
        " their content, not this path, decides whether a stage is up to date. null: start fresh",
    )
    training: TrainingConfig = TrainingConfig(steps=10_000, batch_size=64)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @property
    def noise(self) -> float:
        """`code_noise`, or what null stands for."""
        if self.code_noise is None:
            return 0.1 if self.order == "scale" else 0.0
        return self.code_noise

    @model_validator(mode="after")
    def _check_anneal(self) -> TransformerConfig:
        if self.order_anneal is None:
            return self
        if self.order != "any":
            raise ValueError(f"order_anneal: expected order any, found {self.order}: leave it out")
        if not 0 <= self.order_anneal[0] < self.order_anneal[1]:
            raise ValueError(f"order_anneal: expected two rising steps, found {list(self.order_anneal)}")
        return self

    @model_validator(mode="after")
    def _of_classes(self) -> TransformerConfig:
        if self.condition == "class":
            if self.bpe_dropout:
                raise ValueError("bpe_dropout needs condition text: a class is one token")
            if "text_loss_weight" not in self.model_fields_set:
                object.__setattr__(self, "text_loss_weight", 0.0)
        return self


def forget_derived(section: dict[str, Any], changed: Collection[str]) -> dict[str, Any]:
    """A run's own section, in which every key is given, without those that follow from a key that is to be changed."""
    defaults = {name: field.default for name, field in TransformerConfig.model_fields.items()}
    derived: dict[str, Any] = {}
    if "style" in changed:
        derived |= STYLES.get(str(section.get("style"))) or {name: defaults[name] for name in STYLES["modern"]}
    if "condition" in changed:
        derived["text_loss_weight"] = 0.0 if section.get("condition") == "class" else defaults["text_loss_weight"]
    return {name: value for name, value in section.items() if name not in derived or value != derived[name]}
