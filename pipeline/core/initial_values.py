"""A model that is built without memory, and the values its parameters start with: drawn later, one parameter at a time.

    with initial_values(seed) as initial:
        model = Transformer(layout, shape)           # parameters have a shape, and matrices one element of memory
    for parameter, values in initial.draw(model):    # as the constructor would have written them, each from a generator
        parameter.data = values                      # that (seed, name of the parameter) seeds

So a parameter's values depend on no other, whatever the number of processes or layers; a process can keep its slice of
each and never has more than one of them in full; and one that resumes draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from pipeline.core.seeds import hash63

# By name, of tensors and of torch.nn.init: what writes every element whatever was there, and what changes each alone.
_OVERWRITE = {
    "zero_",
    "zeros_",
    "ones_",
    "fill_",
    "constant_",
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

    call: Callable[..., object]
    arguments: Sequence[object]  # after the parameter
    named: Mapping[str, object]  # without the parameter

    @property
    def name(self) -> str:
        return self.call.__name__

    @torch.no_grad()
    def on(self, values: Tensor) -> None:
        self.call(values, *self.arguments, **self.named)


@dataclass
class _Known:
    """What the constructor of a model did with one of its parameters."""

    parameter: nn.Parameter  # kept, so that its id stays its own
    shape: torch.Size  # which the parameter loses at ZeRO-3
    given: Tensor | None  # a vector's values when it was registered
    writes: list[_Write] = field(default_factory=list)

    def values(self) -> Tensor | None:
        """The parameter's, drawn from torch's global generator; None where no call tells them all."""
        overwrites = [index for index, write in enumerate(self.writes) if write.name in _OVERWRITE]
        if overwrites:
            values, writes = torch.empty(self.shape), self.writes[overwrites[-1] :]
        elif self.given is not None:
            values, writes = self.given.clone(), self.writes
        else:
            return None
        for write in writes:
            write.on(values)
        return values


class InitialValues:
    """What the constructor of a model has written into its parameters, as calls that can be repeated."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[int, _Known] = {}
        self._values_of: Callable[[nn.Parameter, Tensor], Tensor] = lambda parameter, drawn: drawn

    def replace(self, values_of: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
        """From now on `draw` gives `values_of(parameter, what is drawn)`, of the same shape."""
        self._values_of = values_of

    def draw(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of the model once, with its values in float32 and in full.

        Who lets go of values before the next ones come never has two parameters in full.

        Raises:
            RuntimeError: a parameter has got its values in a way that cannot be repeated.
        """
        for name, parameter in model.named_parameters():
            values = self._values_of(parameter, self._drawn(name, parameter))
            yield parameter, values
            del values  # before there are others

    def _drawn(self, name: str, parameter: nn.Parameter) -> Tensor:
        known = self._known.get(id(parameter))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash63("initial values", self._seed, name))
            values = known.values() if known else None
        if values is None:
            raise RuntimeError(f"expected torch.nn.init to write each matrix, found that it does not write {name}")
        return values

    def _without_memory(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) in self._known:
            return parameter
        given = None
        if parameter.ndim >= 2:
            parameter = nn.Parameter(parameter.detach().new_zeros(()).expand(parameter.shape), parameter.requires_grad)
        else:
            given = parameter.detach().clone()
        self._known[id(parameter)] = _Known(parameter, parameter.shape, given)
        return parameter

    def _record(self, call: Callable[..., object], args: Sequence[object], named: Mapping[str, object]) -> bool:
        """Whether this call would write into a parameter, and is recorded instead."""
        name = getattr(call, "__name__", "")
        target = args[0] if args else named.get("tensor")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if not (writes and isinstance(target, nn.Parameter)):
            return False
        if name not in _OVERWRITE | _CHANGE:
            expected = ", ".join(sorted(_OVERWRITE | _CHANGE))
            raise RuntimeError(f"expected a parameter to be initialised by one of {expected}, found {name}")
        if known := self._known.get(id(target)):
            others = {key: value for key, value in named.items() if key != "tensor"}
            known.writes.append(_Write(call, args[1:], others))
        return known is not None


@contextmanager
def initial_values(seed: int) -> Iterator[InitialValues]:
    """Inside, models are built without memory; how they would have filled their parameters is kept."""
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
