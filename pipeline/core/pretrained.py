"""A trained model as a folder: model.safetensors, its weights, and config.json, all that it takes to build it again.

Weights above 5 GB are in several files, which model.safetensors.index.json lists: as Hugging Face has them.

save_model(model, {"layout": …, "shape": …}, "runs/openmoji/transformer/model")
model = load_model("runs/openmoji/transformer/model", "transformer", ("layout", "shape"), build)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.core.atomic_io import expect_files, read_json, write_json
from pipeline.core.errors import UserError
from pipeline.core.initial_values import registering
from pipeline.core.tensor_file import TensorLayout
from pipeline.core.weights import weight_files, write_weights

Model = TypeVar("Model", bound=nn.Module)


def save_model(model: nn.Module, config: Mapping[str, object], directory: str | Path) -> None:
    """Write both files. Weights of any precision are written in float32, other buffers as they are."""
    directory = Path(directory)
    state = model.state_dict()

    def exported(name: str) -> torch.Tensor:
        value: torch.Tensor = state[name]
        return value.float() if value.is_floating_point() else value

    layouts = {name: TensorLayout.of(value).exported for name, value in state.items()}
    write_weights(directory, layouts, exported)
    write_json(directory / "config.json", config)


def load_model(
    directory: str | Path,
    stage: str,
    keys: tuple[str, ...],
    build: Callable[[dict[str, Any], str], Model],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """The model of a folder that `stage` wrote, in eval mode.

    Nothing is initialised on the way: parameters have no memory until they get theirs on `device`, in `dtype`.

    Args:
        keys: what config.json must have.
        build: makes the model, with any weights, from config.json's values and the file's name for errors.
        dtype: of all floating-point weights; None: as `build` makes them, which is float32.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
    """
    directory = Path(directory)
    config, weights = directory / "config.json", directory / "model.safetensors"
    expect_files(directory, stage, *(weight_files(directory) or [weights.name]), config.name)
    values = read_json(config)
    if not isinstance(values, dict) or not set(keys) <= values.keys():
        found = ", ".join(values) or "none" if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{config}: expected the keys {', '.join(keys)}, found {found}; run the stage {stage} again")
    with parameters_without_memory():
        model = build(values, str(config))
    _give_memory(model, dtype, device)
    try:
        # Mapped files, of which is read what is copied: at no time is there a second copy of the model.
        files = [load_file(directory / name) for name in weight_files(directory)]
        model.load_state_dict({name: value for file in files for name, value in file.items()})
    except (SafetensorError, RuntimeError) as error:
        # torch lists every key that differs, a line each; the first difference tells enough.
        reason = [line.strip() for line in str(error).splitlines()][:2][-1]
        raise UserError(
            f"{weights} does not fit config.json beside it ({reason});"
            f" copy both files from one run, or run the stage {stage} again"
        ) from error
    return model.eval()


def cast(model: Model, dtype: torch.dtype) -> Model:
    """A copy in eval mode whose floating-point parameters and buffers are of `dtype`, without a copy as it is."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo: dict[int, object] = {number: _cast(tensor, dtype) for number, tensor in tensors.items()}
    return deepcopy(model, memo).eval()


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    data = tensor.detach()
    other = data.to(dtype) if data.is_floating_point() else data.clone()
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules that are built within have their parameters on the meta device, and buffers and constants as ever."""

    def without_memory(parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    with registering(without_memory), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Leaves out what would be written into parameters: on the meta device that imports half of torch to do nothing."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = func.__name__
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        target = args[0] if args else (kwargs or {}).get("tensor")
        return target if writes and isinstance(target, nn.Parameter) else func(*args, **(kwargs or {}))


def _give_memory(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str) -> None:
    """Uninitialised memory on `device`, in the memory format that the model has chosen; buffers are moved there."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device, dtype=dtype)
            module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
    model.to(device, dtype)
