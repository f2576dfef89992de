"""Nothing that decides results comes from the environment: variables that libraries read for that are refused.

What can be pinned by an argument is pinned where the library is used (`training/engines/`); the rest is listed here.
Threads, devices, caches and logging are the environment's: they decide speed, and rounding as another machine would.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core.errors import UserError

_OFF = ("", "0", "false", "no", "off", "n", "f")
# Accelerate's switches to another way of training have no argument that says no.
_SWITCHES = (
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_USE_SAGEMAKER",
    "NVIDIA_TF32_OVERRIDE",  # CUDA: TensorFloat-32 in every product of matrices
    "PYTORCH_TUNABLEOP_ENABLED",  # torch: kernels chosen by measured time, other ones each time
)
# What they may be; all else changes the precision or the device of a training.
_VALUES = {
    "ACCELERATE_TORCH_DEVICE": (),
    "ACCELERATE_FP8_BACKEND": ("no",),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("strict",),  # CPU: products of matrices in bf16
    "DNNL_DEFAULT_FPMATH_MODE": ("strict",),
}


def refuse_what_decides_results(environment: Mapping[str, str]) -> None:
    """Raises UserError for a variable that would change what a stage makes, and names it."""
    for name in _SWITCHES:
        if environment.get(name, "").lower() not in _OFF:
            raise _refused(name, environment[name])
    for name, harmless in _VALUES.items():
        if environment.get(name, "").lower() not in ("", *harmless):
            raise _refused(name, environment[name])


def _refused(name: str, value: str) -> UserError:
    return UserError(
        f"expected results that the config alone decides, found {name}={value} in the environment, which a library"
        f" reads and which changes them: `unset {name}` and say it in the config, if there is a key for it"
    )
