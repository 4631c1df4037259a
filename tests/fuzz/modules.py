"""Random modules: a case is a short list of steps that prints as the code which makes it again.

    Case((Step("linear", "h @ w.T", 7), Step("activation", "h.relu()")), shape=(3, 8))

A step names a family, one of the family's spellings and a size. What tensors it needs follows from
the value it meets, so steps can be dropped and exchanged freely; one that does not fit where it
stands is left out.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FunctionType
from typing import Any

import torch
from attentions import ATTENTIONS
from convolutions import CONVOLUTIONS
from family import Family
from movement import MOVEMENT
from pointwise import POINTWISE
from products import PRODUCTS
from state import STATES
from torch import Tensor, nn

FAMILIES: dict[str, Family] = {
    **PRODUCTS, **CONVOLUTIONS, **POINTWISE, **ATTENTIONS, **MOVEMENT, **STATES
}  # fmt: skip
MAX_ELEMENTS = 20_000
VALUES = ("normal", "huge", "tiny", "zeros", "outlier", "positive", "constant")
WEIGHTS = ("normal", "huge", "tiny", "zeros", "outlier", "positive")
OUTPUTS: dict[str, Callable[[Tensor, Sequence[Tensor]], Any]] = {
    "h": lambda h, past: h,
    "(h, x)": lambda h, past: (h, past[0]),
    "(h, h)": lambda h, past: (h, h),
    "(h, h[:1])": lambda h, past: (h, h[:1]),
    "(h, x.flatten())": lambda h, past: (h, past[0].flatten()),
    "[h, None, 3]": lambda h, past: [h, None, 3],
    "dict": lambda h, past: {"last": h, "first": past[0] * 2, "all": (h.detach(),)},
    "every step": lambda h, past: (*past[1:], h),
}


@dataclass(frozen=True)
class Step:
    """One step: a family, its spelling, and a size that the family interprets."""

    family: str
    spelling: str
    size: int = 1

    def __repr__(self) -> str:
        size = f", {self.size}" if self.size != 1 else ""
        return f'Step("{self.family}", "{self.spelling}"{size})'


@dataclass(frozen=True)
class Case:
    """A module and its inputs.

    Args:
        steps: what the module does to `x`, in order.
        shape: of `x`, without the batch.
        batches: sizes of dimension 0: that of the example and that of a second call.
        dtype: of weights and inputs.
        values: how `x` is distributed, a key of `VALUES`.
        weights: how weights are distributed.
        second_input: whether the module takes a `y` like `x`.
        n: a Python argument of the module.
        output: what it returns, a key of `OUTPUTS`.
        seed: of weights and inputs.
    """

    steps: tuple[Step, ...] = ()
    shape: tuple[int, ...] = (3, 8)
    batches: tuple[int, int] = (2, 3)
    dtype: str = "float32"
    values: str = "normal"
    weights: str = "normal"
    second_input: bool = False
    n: int = 1
    output: str = "h"
    seed: int = 0

    def __repr__(self) -> str:
        plain = Case()
        named = [
            f"{name}={value!r}"
            for name in list(self.__dataclass_fields__)[1:]
            if (value := getattr(self, name)) != getattr(plain, name)
        ]
        steps = "".join(f"{step!r}, " for step in self.steps).rstrip()
        return f"Case({', '.join([f'({steps})', *named])})".replace(",)", ",)")

    def inputs(self, call: int = 0) -> tuple[Any, ...]:
        """Return the arguments of a call: the example's batch for an even one, else the second."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + call)
        shape = (self.batches[call % 2], *self.shape)
        x = _drawn(shape, self.values if call != 1 else "normal", 1.0, generator)
        y = _drawn(shape, "normal", 1.0, generator)
        dtype = getattr(torch, self.dtype)
        return (x.to(dtype), y.to(dtype) if self.second_input else None, self.n)

    def model(self) -> "Machine":
        """Return the module in eval mode."""
        return Machine(self).eval()


def trimmed(case: Case) -> Case:
    """Return `case` without the steps that do not fit where they stand."""
    return replace(case, steps=case.model().fitting)


class Machine(nn.Module):
    """Runs the steps of a case."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)
        dtype = getattr(torch, case.dtype)

        def draw(*shape: int) -> Tensor:
            fan_in = max(shape[1:], default=4)
            return _drawn(shape, case.weights, fan_in**-0.5, generator).to(dtype)

        self.layers = nn.ModuleList()
        self.output = case.output
        fitting = []
        x, y, n = case.inputs()
        past = [x] if y is None else [x, y]
        h = past[0]
        for step in case.steps:
            layer = _built(FAMILIES[step.family], step, past, h, draw, list(self.parameters()))
            value = None if layer is None else _tried(layer.to(dtype), h, past, n)
            if value is None:
                continue
            fitting.append(step)
            self.layers.append(layer)
            past.append(h)
            h = value
        self.fitting = tuple(fitting)

    def forward(self, x: Tensor, y: Tensor | None = None, n: int = 1) -> Any:
        h = x
        past = [x] if y is None else [x, y]
        for layer in self.layers:
            value = layer(h, past, n)
            past.append(h)
            h = value
        return OUTPUTS[self.output](h, past)


class Layer(nn.Module):
    """One step with its tensors."""

    def __init__(self, forward: Callable[..., Tensor], size: int, other: int | None) -> None:
        super().__init__()
        self.function, self.size, self.other = forward, size, other

    def forward(self, h: Tensor, past: Sequence[Tensor], n: int) -> Tensor:
        self_or_past = h if self.other is None else past[self.other]
        return self.function(self, h, self_or_past, n)


def _built(
    family: Family,
    step: Step,
    past: Sequence[Tensor],
    h: Tensor,
    draw: Callable[..., Tensor],
    known: Sequence[nn.Parameter],
) -> Layer | None:
    """Return the layer of a step that meets `h`, None where it does not fit."""
    others = [i for i, value in enumerate(past) if value.shape == h.shape]
    other = others[step.size % len(others)] if others else None
    layer = Layer(family.spellings[step.spelling], step.size, other)
    shapes = family.tensors(tuple(h.shape), step.size)
    if shapes is None:
        return None
    names = _names(layer.function)
    for name in [name for name in shapes if name in names]:
        tied = [p for p in known if tuple(p.shape) == tuple(shapes[name])]
        if "tied" in step.spelling and tied:
            layer.register_parameter(name, tied[step.size % len(tied)])
        elif name in family.buffers:
            layer.register_buffer(name, torch.zeros(shapes[name]))
        else:
            value = draw(*shapes[name]).float()
            layer.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for name, make in family.modules.items():
        if name in names:
            with torch.random.fork_rng():
                torch.manual_seed(step.size)
                setattr(layer, name, make(tuple(h.shape), step.size).requires_grad_(False))
    return layer


def _names(function: Callable[..., Any]) -> set[str]:
    """Return the attributes that a spelling reads, in functions inside it and helpers beside it."""
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
        helpers = [function.__globals__.get(name) for name in code.co_names if name not in names]
        codes += [f.__code__ for f in helpers if isinstance(f, FunctionType)]
        names.update(code.co_names)
    return names


def _tried(layer: Layer, h: Tensor, past: Sequence[Tensor], n: int) -> Tensor | None:
    """Return the value of a layer, None where it raises or grows beyond what is tiny."""
    probe, copies = h.clone(), [value.clone() for value in past]
    state = copy.deepcopy(layer.state_dict())
    try:
        with torch.no_grad():
            value = layer(probe, copies, n)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    layer.load_state_dict(state)
    if value.dtype != h.dtype or value.numel() > MAX_ELEMENTS or not value.numel():
        return None
    return value if value.ndim else None


def _drawn(shape: Sequence[int], kind: str, scale: float, generator: torch.Generator) -> Tensor:
    value = torch.randn(*shape, generator=generator) * scale
    match kind:
        case "huge":
            return value * 1e3
        case "tiny":
            return value * 1e-5
        case "zeros":
            return value * 0
        case "outlier":
            factor = torch.ones(shape[-1])
            factor[int(torch.randint(shape[-1], (), generator=generator))] = 300.0
            return value * factor
        case "positive":
            return value.abs()
        case "constant":
            return value * 0 + 0.3
    return value


def all_steps() -> Iterator[Step]:
    """Return every spelling of every family once."""
    for name, family in FAMILIES.items():
        for spelling in family.spellings:
            yield Step(name, spelling, 2)
