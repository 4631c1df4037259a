"""Floating-point operations of any operator, counted by torch.

A list of the operators that multiply is never complete: torch writes hundreds in terms of others
(`aten.lstm`, `aten.tensordot`, `aten.cov`). So an operator runs once on tensors without memory
under torch's own `FlopCounterMode`, which sees what it expands to. What torch has no formula for
is in `FORMULAS`. Solvers, factorizations and Fourier transforms are no products and count nothing.
An operator that another library registered, and that torch cannot see into, cannot be counted.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import hint, is_constant, val_of

aten = torch.ops.aten
KNOWN = frozenset({"aten", "prims", "prim", "fxq"})  # namespaces of operators
Shape = Sequence[int]


@dataclass(frozen=True)
class _Like:
    """A tensor without memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]  # some products take one memory order only
    dtype: torch.dtype


def _of_first(a: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(a)


def _of_second(added: Shape, a: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(a)


def _of_result(a: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * a[-1]


def _of_added(added: Shape, a: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * a[-1]


def _addbmm(added: Shape, a: Shape, b: Shape, *, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _conv_tbc(x: Shape, weight: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[:2])


def _trilinear(a: Shape, b: Shape, c: Shape, *expand: Any, out_shape: Shape, **kwargs: Any) -> int:
    """Sum of a * b * c, each with axes of size 1 put in where `expand` says."""
    shapes = []
    for shape, places in zip((a, b, c), expand, strict=False):
        sizes = list(shape)
        for place in sorted(places):
            sizes.insert(place, 1)
        shapes.append(sizes)
    return 2 * math.prod(map(max, zip(*shapes, strict=True)))


def _grouped_mm(a: Shape, b: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    """A product per group. Of two matrices the groups are parts of K, which all together have it;
    otherwise the result has a part for each, of rows, of columns or on an axis of its own."""
    groups = out_shape[0] if len(a) == len(b) == 2 else 1
    return 2 * math.prod(out_shape) * a[-1] // max(groups, 1)


FORMULAS: Mapping[Any, Callable[..., int]] = {
    aten.mv: _of_first,
    aten.dot: _of_first,
    aten.vdot: _of_first,
    aten.addmv: _of_second,
    aten.addbmm: _addbmm,
    aten.conv_tbc: _conv_tbc,
    aten._trilinear: _trilinear,
    aten._grouped_mm: _grouped_mm,
    aten._scaled_grouped_mm: _grouped_mm,
    aten._scaled_grouped_mm_v2: _grouped_mm,
    aten._scaled_mm_v2: _of_result,
    aten._addmm_activation: _of_added,
    aten._int_mm: _of_result,
    aten._weight_int8pack_mm: _of_result,
    aten._weight_int4pack_mm: _of_result,
    aten._weight_int4pack_mm_for_cpu: _of_result,
    aten._dyn_quant_matmul_4bit: _of_result,
    aten._cdist_forward: _of_result,
    aten._euclidean_dist: _of_result,
    aten.affine_grid_generator: _of_result,
}


def counted_flops(node: Node, sizes: Mapping[str, int] | None = None) -> int:
    """Return the operations torch counts in a node and whatever it expands to.

    Args:
        node: any node.
        sizes: values of free sizes by name, as for `fxq.graph.hint`.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _may_multiply(target):
        return 0
    args = _frozen(node.args, sizes)
    return _count(target, args, _frozen(sorted(node.kwargs.items()), sizes))


def is_opaque(node: Node) -> bool:
    """Tell whether a node calls an operator of another library that reads floating-point values and
    whose operations cannot be counted."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in KNOWN:
        return False
    return not _may_multiply(target) and any(map(_is_floating, node.all_input_nodes))


def reads_weight(node: Node) -> bool:
    """Tell whether a node reads a floating-point constant of two dimensions or more."""
    constants = filter(is_constant, node.all_input_nodes)
    return any(_is_floating(value) and val_of(value).ndim > 1 for value in constants)


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@functools.cache
def _may_multiply(target: torch._ops.OpOverload) -> bool:
    """Tell whether an operator has a formula, or is written in terms of other operators."""
    if _has_formula(target):
        return True
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd.name
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), implicit)


def _has_formula(target: torch._ops.OpOverload) -> bool:
    from torch.utils.flop_counter import flop_registry  # torch loads Triton with it

    return target.overloadpacket in FORMULAS or target.overloadpacket in flop_registry


@functools.lru_cache(maxsize=4096)
def _count(target: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    positional, keyword = _thawed(args), dict(_thawed(kwargs))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(FORMULAS)) as counter:
        try:
            target(*positional, **keyword)
        except RuntimeError:
            if _has_formula(target):
                raise
            return 0  # it reads values, as `item` does, which no product needs
    return int(counter.get_total_flops())


def _frozen(value: Any, sizes: Mapping[str, int] | None) -> Any:
    """Return an argument as something hashable, with tensors as `_Like` and sizes as numbers."""
    if isinstance(value, Node):
        return _frozen(val_of(value), sizes) if "val" in value.meta else None
    if isinstance(value, Tensor):
        shape, stride = (
            tuple(hint(n, sizes) for n in numbers) for numbers in (value.shape, value.stride())
        )
        return _Like(shape, stride, value.dtype)
    if isinstance(value, torch.SymInt):
        return hint(value, sizes)
    if isinstance(value, tuple | list):
        return tuple(_frozen(item, sizes) for item in value)
    if isinstance(value, torch.SymFloat | torch.SymBool):
        return value.node.hint
    return torch.device("meta") if isinstance(value, torch.device) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Like):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value
