"""A CLIP of a few thousand random weights, saved as transformers saves one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def save_clip(folder: Path, captions: list[str]) -> Path:
    """Its tokenizer knows the words of `captions`."""
    words = ["<s>", "</s>", *sorted({word for caption in captions for word in caption.split()})]
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": max(len(words), 20), "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    config = CLIPConfig(
        text_config=tower | text, vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder
