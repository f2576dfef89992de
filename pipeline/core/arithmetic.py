"""How a GPU computes: TensorFloat-32, and the same bits at each run; CPUs know one way. Whether a CPU has bf16."""

from __future__ import annotations

import logging
import os

import torch

from pipeline.core.errors import UserError

log = logging.getLogger(__name__)
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")  # NVIDIA, cuBLAS, "Results reproducibility"


def cpu_has_bf16() -> bool:
    """Whether products in bf16 are as fast as in float32 or faster on this machine's CPU: on x86 it takes AVX-512."""
    of_onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # some builds are without oneDNN
    return of_onednn is not None and bool(of_onednn())


def prepare_determinism() -> None:
    """Before anything computes on a GPU, because cuBLAS reads its variable once.

    Raises:
        UserError: the environment says otherwise.
    """
    found = os.environ.setdefault(_CUBLAS, _CUBLAS_DETERMINISTIC[0])
    if found not in _CUBLAS_DETERMINISTIC:
        raise UserError(
            f"expected {_CUBLAS} to be one of {', '.join(_CUBLAS_DETERMINISTIC)} with training.deterministic,"
            f" found {found} in the environment: unset it"
        )


def set_arithmetic(tf32: bool, deterministic: bool) -> None:
    """Set both for this process, and say in the log what a GPU does.

    Args:
        tf32: float32 products and convolutions round their factors to 11 bits (NVIDIA GPUs since Ampere).
        deterministic: no kernels that add in another order each time; an operation that has no other is an error.
    """
    on_gpu = torch.cuda.is_available()
    # Containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; on CPUs "high" would be other arithmetic.
    torch.set_float32_matmul_precision("high" if tf32 and on_gpu else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False  # it chooses kernels by measured time
    if deterministic:
        prepare_determinism()
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call loads torch's compiler, for a second
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if on_gpu:
        log.info("float32 on this GPU: TF32 %s; deterministic: %s", "on" if tf32 else "off", deterministic)


def without_deterministic_form(error: RuntimeError) -> str | None:
    """The operation that `deterministic` refused, if `error` says that of one."""
    operation, refused, _ = str(error).partition(" does not have a deterministic implementation")
    return operation if refused else None
