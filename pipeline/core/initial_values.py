"""A model that is built without memory, and the values its parameters start with: drawn later, one parameter at a time.

    with initial_values(seed) as initial:
        model = Transformer(layout, shape)        # parameters have a shape, and matrices one element of memory
    for parameter, values in initial.draw():      # the bits that `torch.manual_seed(seed); Transformer(layout, shape)`
        parameter.data = values                   # would have written

So a process can keep its slice of each parameter and never has more than one of them in full, whatever the number of
processes; and one that resumes draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

# By name, of tensors and of torch.nn.init: what writes every element whatever was there, and what changes each alone.
_NOT_RANDOM = {"zero_", "zeros_", "ones_", "fill_", "constant_"}
_OVERWRITE = _NOT_RANDOM | {
    "normal_",
    "uniform_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "xavier_normal_",
    "xavier_uniform_",
}
_CHANGE = {"mul_", "add_", "sub_", "div_", "erfinv_", "clamp_"}


@dataclass(frozen=True)
class _Write:
    """One call that would have written into a parameter."""

    parameter: nn.Parameter
    shape: torch.Size  # the parameter itself may have lost it by now
    call: Callable[..., object]
    arguments: Sequence[object]  # after the parameter
    named: Mapping[str, object]  # without the parameter

    @property
    def name(self) -> str:
        return self.call.__name__

    @torch.no_grad()
    def on(self, values: Tensor) -> None:
        self.call(values, *self.arguments, **self.named)


class InitialValues:
    """What the constructor of a model has written into its parameters, as calls that can be repeated."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._writes: list[_Write] = []
        self._given: dict[int, tuple[nn.Parameter, Tensor]] = {}  # vectors, with what their constructors gave them
        self._known: set[int] = set()
        self._values_of: Callable[[nn.Parameter, Tensor], Tensor] = lambda parameter, drawn: drawn

    def replace(self, values_of: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
        """From now on `draw` gives `values_of(parameter, what is drawn)`, of the same shape."""
        self._values_of = values_of

    def draw(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter once, with its values in float32 and in full, in an order of its own.

        Who lets go of values before the next ones come never has two parameters in full.

        Raises:
            RuntimeError: a matrix has got its values in a way that cannot be repeated.
        """
        for parameter, drawn in self._drawn():
            values = self._values_of(parameter, drawn)
            del drawn
            yield parameter, values
            del values  # before there are others

    def _drawn(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """As the constructor would have drawn them.

        It seeds torch's global generator; until its end nothing else may draw from that.
        """
        torch.manual_seed(self._seed)
        last = {id(write.parameter): i for i, write in enumerate(self._writes) if write.name in _OVERWRITE}
        for number, given in self._given.items():
            if number not in last:
                yield given[0], self._changed(given[1].clone(), given[0], 0)
        for index, write in enumerate(self._writes):
            is_last = last.get(id(write.parameter)) == index
            if not (is_last or write.name in _OVERWRITE - _NOT_RANDOM):
                continue
            values = torch.empty(write.shape)
            write.on(values)  # one that is overwritten later has advanced the generator
            if is_last:
                yield write.parameter, self._changed(values, write.parameter, index)
            del values
        if lost := self._known - last.keys() - self._given.keys():
            raise RuntimeError(f"expected torch.nn.init to write each matrix, found {len(lost)} that it does not write")

    def _changed(self, values: Tensor, parameter: nn.Parameter, since: int) -> Tensor:
        """After what the constructor did with the parameter's elements from its write `since` on."""
        for write in self._writes[since:]:
            if write.parameter is parameter and write.name in _CHANGE:
                write.on(values)
        return values

    def _without_memory(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) in self._known:
            return parameter
        if parameter.ndim >= 2:
            parameter = nn.Parameter(parameter.detach().new_zeros(()).expand(parameter.shape), parameter.requires_grad)
        else:
            self._given[id(parameter)] = parameter, parameter.detach().clone()
        self._known.add(id(parameter))
        return parameter

    def _record(self, call: Callable[..., object], args: Sequence[object], named: Mapping[str, object]) -> bool:
        """Whether this call would write into a parameter, and is recorded instead."""
        name = getattr(call, "__name__", "")
        target = args[0] if args else named.get("tensor")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if not (writes and isinstance(target, nn.Parameter)):
            return False
        if name not in _OVERWRITE | _CHANGE:
            known = ", ".join(sorted(_OVERWRITE | _CHANGE))
            raise RuntimeError(f"expected a parameter to be initialised by one of {known}, found {name}")
        others = {key: value for key, value in named.items() if key != "tensor"}
        self._writes.append(_Write(target, target.shape, call, args[1:], others))
        return True


@contextmanager
def initial_values(seed: int) -> Iterator[InitialValues]:
    """Inside, models are built without memory; what they would have drawn after `torch.manual_seed(seed)` is kept."""
    initial = InitialValues(seed)
    with registering(initial._without_memory), _Recorder(initial):
        yield initial


@contextmanager
def registering(replace: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Inside, a module that is built registers `replace(parameter)` in a parameter's place."""

    def on_registration(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        return replace(parameter)

    hook = register_module_parameter_registration_hook(on_registration)  # type: ignore[arg-type]  # stub: returns None
    try:
        yield
    finally:
        hook.remove()


def has_values(model: nn.Module) -> bool:
    """Whether a model that was built inside of `initial_values` has got its memory."""
    return all(parameter.is_contiguous() for parameter in model.parameters() if parameter.numel() > 1)


class _Recorder(TorchFunctionMode):
    def __init__(self, initial: InitialValues) -> None:
        super().__init__()
        self._initial = initial

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        if self._initial._record(func, args, named):
            return args[0] if args else named["tensor"]
        return func(*args, **named)
