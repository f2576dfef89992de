"""The memory of an image tokenizer on a GPU at any image size, before anything is trained (`smalti plan`).

Counted on fake tensors, as the transformer's is (`live_memory.py`): a training step of a micro-batch, with what it
recomputes, and `encode` and `decode` of one image, in its tiles where it has them. Without perceptual and adversarial
losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.training import TrainingConfig, accumulation_steps, resolved_precision
from pipeline.core.image_size import ImageSize

if TYPE_CHECKING:
    from pipeline.config.image_tokenizer import ImageTokenizerConfig
    from pipeline.core.objective import Objective
    from pipeline.image_tokenizer import ImageTokenizer

_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class TokenizerMemory:
    """Bytes on one GPU at a size of images."""

    micro_batch: int
    training: int  # at the peak of a step, with weights, gradients, optimizer, average
    encode: int  # of one image in float32, with the weights
    decode: int


def tokenizer_memory(config: ImageTokenizerConfig, image_size: ImageSize, gpus: int) -> TokenizerMemory:
    """The memory of the tokenizer that `config` names, of whose batch each of `gpus` processes has its part.

    Raises:
        UserError: the GPUs do not divide the batch, or images of this size cannot be cut into its codes.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from pipeline.core.fake_cuda import fake_cuda, to_fake_cuda
    from pipeline.image_tokenizer.base import build
    from pipeline.image_tokenizer.pretrained import model_of
    from pipeline.training.activation_checkpointing import checkpoint_activations
    from pipeline.training.live_memory import passes

    training = config.training
    micro = training.batch_size // gpus // accumulation_steps(training, gpus)
    # Bytes are the same in either layout, and fake tensors cannot always be converted.
    kind = model_of(config).model_copy(update={"channels_last": False})
    with FakeTensorMode():
        tokenizer = build(kind, image_size)
        objective = tokenizer.objective()
    with fake_cuda():
        to_fake_cuda(objective)
        encode, decode = _peaks_of_one(tokenizer.eval())
        if training.activation_checkpointing != "none":
            checkpoint_activations(objective, training.activation_checkpointing)
        batch = {"images": torch.zeros(micro, 3, tokenizer.height, tokenizer.width, dtype=torch.uint8, device="cuda")}
        precision = resolved_precision(training.precision, True, "accelerate")
        found = passes(objective, batch, precision)
        weights = sum(t.nbytes for t in (*objective.parameters(), *objective.buffers()))
        held = weights + _kept_beside(training, objective)
    step = max(found.before_gradients, found.with_gradients)
    return TokenizerMemory(micro, held + step, weights + encode, weights + decode)


def _kept_beside(training: TrainingConfig, objective: Objective) -> int:
    """AdamW's two moments, of what Muon trains one, and the moving average."""
    from pipeline.training.optimizer import muon_matrices

    parameters = sum(p.numel() for p in objective.parameters())
    of_muon = sum(p.numel() for p in muon_matrices(objective)) if training.optimizer == "muon" else 0
    return _FLOAT32 * (parameters * (3 if training.ema_decay else 2) - of_muon)


def _peaks_of_one(tokenizer: ImageTokenizer) -> tuple[int, int]:
    """The peaks beside the weights of `encode` and `decode` of one image."""
    import torch

    from pipeline.training.live_memory import LiveBytes

    found: list[int] = []
    images = torch.zeros(1, 3, tokenizer.height, tokenizer.width, device="cuda")
    codes = [torch.zeros(1, level.positions, dtype=torch.long, device="cuda") for level in tokenizer.levels]
    for work in (lambda: tokenizer.encode(images), lambda: tokenizer.decode(codes)):
        live = LiveBytes()
        for tensor in (*tokenizer.parameters(), *tokenizer.buffers()):
            live.know(tensor)
        with live, torch.no_grad():
            work()
        found.append(live.peak)
    return found[0], found[1]
