"""Loads a transformer's folder in bf16, as AutoModel or as Smalti does; waits for a line before and after."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModel

import pipeline.transformer.hf  # noqa: F401 – registers the type
from pipeline.transformer.build import load_transformer


def main(how: str, small: str, large: str) -> None:
    """The small one first, which imports what loading imports."""
    for folder in (small, large):
        print("ready", flush=True)
        input()
        loaded = (
            AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
            if how == "AutoModel"
            else load_transformer(folder, torch.bfloat16)
        )
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    print("loaded", flush=True)
    input()


if __name__ == "__main__":
    main(*sys.argv[1:])
