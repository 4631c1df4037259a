"""Fold: put scales and shifts of sites into the weights, in fp64, rounding once.

    layer   y = W x + b     W' = W * s_in / s_out     b' = (b + W d_in - d_out) / s_out
    norm    y = n(x) w + b  w' = w / s_out            b' = (b - d_out) / s_out
    sum     a + c           c' = (c - d_out) / s_out

s_in and d_in undo what the producers of x did, s_out and d_out are the layer's own part in the
sites after it; all sites are collected first. Weights, biases and norm parameters that were not
there are added. New tensors are buffers of the graph: the model's own are never written to.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.analysis.labels import sizes_of
from fxq.errors import UnsupportedError
from fxq.graph import constant_of, dtype_of, is_constant, owner_name
from fxq.identity import TensorKey
from fxq.layer import layer_of, set_facts
from fxq.operators import LAYERS, NORMS, operand, set_operand
from fxq.passes.common.scaling.sites import Part, ScaleSite
from fxq.rewriting import add_buffer, erase_dead, insert_call

aten = torch.ops.aten
CHUNK = 1 << 18  # elements of a weight that are in fp64 at a time: 2 MB, which caches hold


@dataclass(frozen=True, eq=False)
class Scaling:
    """A site and what a method wants done to it.

    Args:
        site: where.
        scale: the activation is divided by it `[n_channels]`, finite and > 0.
        shift: and this is taken from it first `[n_channels]`; None shifts nothing.
    """

    site: ScaleSite
    scale: Tensor
    shift: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if value is None:
                continue
            if value.shape != (self.site.n_channels,) or not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name} of {self.site.name}: expected {self.site.n_channels} finite values, "
                    f"found shape {list(value.shape)}, "
                    f"{int((~value.isfinite()).sum())} of them NaN or Inf"
                )
        if bool((self.scale <= 0).any()):
            raise ValueError(
                f"scale of {self.site.name}: expected values > 0, found {float(self.scale.min())}"
            )
        if self.shift is not None and bool(self.shift.any()) and self.site.why_no_shift:
            raise UnsupportedError(
                f"shift of {self.site.name}: {self.site.why_no_shift}; pass shift=None"
            )


@dataclass
class _Change:
    """What is done to one node: factors and shifts per channel, fp64; None leaves a side alone."""

    scale_in: Tensor | None = None
    shift_in: Tensor | None = None
    scale_out: Tensor | None = None
    shift_out: Tensor | None = None
    operands: dict[int, "_Change"] = field(default_factory=dict)

    @property
    def sides(self) -> set[str]:
        """Which of input and output are scaled, and whether any is shifted."""
        scaled = {"input": self.scale_in, "output": self.scale_out}
        shifted = self.shift_in is not None or self.shift_out is not None
        return {name for name, factor in scaled.items() if factor is not None} | (
            {"shift"} if shifted else set()
        )

    def divide_out(self, scale: Tensor) -> None:
        self.scale_out = scale if self.scale_out is None else self.scale_out * scale

    def subtract_out(self, shift: Tensor) -> None:
        self.shift_out = shift if self.shift_out is None else self.shift_out + shift

    def multiply_in(self, scale: Tensor, shift: Tensor | None) -> None:
        self.scale_in = scale if self.scale_in is None else self.scale_in * scale
        if shift is not None:
            self.shift_in = shift if self.shift_in is None else self.shift_in + shift


@torch.no_grad()
def fold_scaling(gm: GraphModule, scalings: Iterable[Scaling]) -> None:
    """Rewrite a graph so that every site's edge is scaled and shifted, and its function is kept.

    Args:
        gm: the graph the sites were found in.
        scalings: at most one per site.
    Raises:
        ValueError: a weight would overflow its dtype.
    """
    changes: dict[Node, _Change] = {}
    quantizers = []
    for scaling in scalings:
        _collect(changes, scaling)
        if scaling.site.edge is not None:
            quantizers.append(scaling)
    cache: dict[object, Node] = {}
    for node, change in changes.items():
        if node.target in LAYERS:
            _rewrite_layer(gm, node, change, cache)
            # What must be undone before the layer compares with the model's module (fxq.judging).
            set_facts(node, scaled=tuple(sorted({*layer_of(node).scaled, *change.sides})))
        elif node.target in NORMS:
            _rewrite_norm(gm, node, change)
        for index, term in change.operands.items():
            _rewrite_operand(gm, node, index, term)
    for scaling in quantizers:
        _divide_edge(gm, scaling)
    erase_dead(gm)


def _collect(changes: dict[Node, _Change], scaling: Scaling) -> None:
    site, shift = scaling.site, scaling.shift
    if shift is not None and not bool(shift.any()):
        shift = None
    for part in site.consumers:
        moved = None if shift is None else part.spread(shift, 0.0)
        _of(changes, part).multiply_in(part.spread(scaling.scale, 1.0), moved)
    for part in site.producers:
        scale = part.spread(scaling.scale, 1.0)
        _of(changes, part).divide_out(1 / scale if part.inverse else scale)
    for part in site.shifted if shift is not None else ():
        assert shift is not None
        _of(changes, part).subtract_out(part.spread(shift, 0.0))


def _of(changes: dict[Node, _Change], part: Part) -> _Change:
    change = changes.setdefault(part.node, _Change())
    return change if part.index is None else change.operands.setdefault(part.index, _Change())


def _rewrite_layer(gm: GraphModule, node: Node, change: _Change, cache: dict[object, Node]) -> None:
    value = _parameter(node, "weight")
    assert value is not None
    key = (TensorKey.of(value), *map(_bytes, _factors(change)))
    if key not in cache:  # layers that share a weight share its variables, and go on sharing it
        try:
            scaled = _scaled_weight(value, change)
        except OverflowError as error:
            raise ValueError(f"weight of {owner_name(node)}: {error}") from error
        cache[key] = add_buffer(gm, f"{owner_name(node)}.weight_scaled", scaled, like=node)
    bias = _parameter(node, "bias")
    new_bias = _bias(value, bias, change)
    set_operand(node, "weight", cache[key])
    if new_bias is not None:
        name = f"{owner_name(node)}.bias_scaled"
        buffer = add_buffer(gm, name, new_bias.to(value.dtype), like=node)
        set_operand(node, "bias", buffer)


def _factors(change: _Change) -> tuple[Tensor | None, Tensor | None]:
    return change.scale_in, change.scale_out


def _bytes(value: Tensor | None) -> bytes:
    return b"" if value is None else value.numpy().tobytes()


def _scaled_weight(weight: Tensor, change: _Change) -> Tensor:
    """Return `W * s_in / s_out` in the weight's dtype, computed a few rows at a time."""
    n, tail = len(weight), (1,) * (weight.ndim - 2)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    columns = None
    if change.scale_in is not None:
        columns = _per_group(change.scale_in.to(weight.device), weight)  # [N or 1, C]
    rows = max(1, CHUNK // max(1, weight[0].numel())) if n else 1
    for start in range(0, n, rows):
        part = weight[start : start + rows].double()
        if columns is not None:
            some = columns if len(columns) == 1 else columns[start : start + rows]
            part = part * some.reshape(*some.shape, *tail)
        if change.scale_out is not None:
            divisor = change.scale_out[start : start + rows].to(weight.device)
            part = part / divisor.reshape(-1, 1, *tail)
        rounded = part.to(weight.dtype)
        if bool(part.isfinite().all()) and not bool(rounded.isfinite().all()):
            raise OverflowError(
                f"expected it to stay finite in {weight.dtype}, found magnitudes up to "
                f"{float(part.abs().max()):.1e}; use smaller factors, or fp32"
            )
        out[start : start + rows] = rounded
    return out


def _per_group(values: Tensor, weight: Tensor) -> Tensor:
    """Return values of all input channels as the weight's rows see them: `[1, C]`, or `[N, C / g]`
    for a convolution of g groups."""
    n, per_group = weight.shape[:2]
    groups = len(values) // per_group
    if groups == 1:
        return values[None]
    return values.reshape(groups, per_group).repeat_interleave(n // groups, 0)


def _bias(weight: Tensor, bias: Tensor | None, change: _Change) -> Tensor | None:
    """Return `(b + W d_in - d_out) / s_out` in fp64, None where there is and was none."""
    if bias is None and change.shift_in is None and change.shift_out is None:
        return None
    device = weight.device
    total = torch.zeros(len(weight), dtype=torch.float64, device=device)
    if bias is not None:
        total += bias.double()
    if change.shift_in is not None:
        shift = _per_group(change.shift_in.to(device), weight)
        rows = max(1, CHUNK // max(1, weight[0].numel()))
        for start in range(0, len(weight), rows):
            some = shift if len(shift) == 1 else shift[start : start + rows]
            part = weight[start : start + rows].double()
            part = part.flatten(2).sum(2) if part.ndim > 2 else part
            total[start : start + rows] += (part * some).sum(1)
    if change.shift_out is not None:
        total -= change.shift_out.to(device)
    return total if change.scale_out is None else total / change.scale_out.to(device)


def _rewrite_norm(gm: GraphModule, node: Node, change: _Change) -> None:
    weight, bias = _parameter(node, "weight"), _parameter(node, "bias")
    some = change.scale_out if change.scale_out is not None else change.shift_out
    if some is None:
        return
    reference = weight if weight is not None else bias
    dtype = dtype_of(node) if reference is None else reference.dtype
    device = node.meta["val"].device if reference is None else reference.device
    divisor = torch.ones_like(some) if change.scale_out is None else change.scale_out
    divisor = divisor.to(device)
    scaled = (1.0 if weight is None else weight.double()) / divisor
    set_operand(node, "weight", _add(gm, node, "weight_scaled", scaled.to(dtype)))
    if bias is None and change.shift_out is None:
        return
    total = torch.zeros_like(divisor) if bias is None else bias.double()
    if change.shift_out is not None:
        total = total - change.shift_out.to(device)
    moved = _add(gm, node, "bias_scaled", (total / divisor).to(dtype))
    if node.target is aten.rms_norm.default:  # it has no bias
        result = insert_call(aten.add.Tensor, (node, moved), after=node)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    else:
        set_operand(node, "bias", moved)


def _rewrite_operand(gm: GraphModule, node: Node, index: int, change: _Change) -> None:
    operand: Any = node.args[index]
    dtype, device = dtype_of(node), operand.meta["val"].device
    scale, shift = change.scale_out, change.shift_out
    if is_constant(operand):
        value = constant_of(operand).double()
        if shift is not None:
            value = value - shift.to(device)
        if scale is not None:
            value = value / scale.to(device)
        result = _add(gm, node, "operand_scaled", value.to(dtype))
    else:
        result = operand
        if shift is not None:
            moved = _add(gm, node, "shift", shift.to(device, dtype))
            result = insert_call(aten.sub.Tensor, (result, moved), before=node)
        if scale is not None:
            factor = _add(gm, node, "reciprocal", (1 / scale).to(device, dtype))
            result = insert_call(aten.mul.Tensor, (result, factor), before=node)
    node.update_arg(index, result)


def _divide_edge(gm: GraphModule, scaling: Scaling) -> None:
    """Divide the edge of a quantizer site by an explicit product, for its consumers only."""
    edge = scaling.site.edge
    assert edge is not None
    first = scaling.site.consumers[0].node
    tail = (1,) * (len(sizes_of(first.args[1])) - 2)
    value = (1 / scaling.scale.double()).reshape(-1, *tail)
    value = value.to(edge.meta["val"].device, dtype_of(edge))
    factor = _add(gm, first, "input_reciprocal", value)
    product = insert_call(aten.mul.Tensor, (edge, factor), after=edge, like=first)
    for part in scaling.site.consumers:
        part.node.update_arg(0, product)
        # Convert makes the product part of the quantizer after it.
        set_facts(part.node, divided=True)


def _add(gm: GraphModule, node: Node, name: str, value: Tensor) -> Node:
    return add_buffer(gm, f"{owner_name(node)}.{name}", value, like=node)


def _parameter(node: Node, name: str) -> Tensor | None:
    value = operand(node, name, None)
    return constant_of(value) if isinstance(value, Node) else None
