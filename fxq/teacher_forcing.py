"""Teacher forcing: one layer of a program, given what the model's own module was given.

A layer that a scaling pass rewrote has another input and output than the module. By which factors
is read off its weight, so a wrong weight is seen and a wrong factor is not: that one shows in the
program's outputs and in what a scaling pass checks itself.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

import fxq.ops  # noqa: F401  registers the operators
from fxq.graph import args_of, is_op, result_of, shape_of
from fxq.layer import layer_of
from fxq.numerics import sqnr_db

ops = torch.ops.fxq
QUANTIZING = (
    ops.quantize.default, ops.dequantize.default, ops.choose_qparams.default,
    ops.guard_scale.default, operator.getitem,
)  # fmt: skip
SAME_DB = 40.0  # a module that computes the operator and nothing else, up to rounding in bfloat16


class Call(NamedTuple):
    """What a module of the model was given and what it returned."""

    input: Tensor
    output: Tensor


def compare_layer(
    node: Node, module: Any, call: Call, recorded: Mapping[str, Any]
) -> tuple[float, float] | str:
    """Return the SQNR of a layer alone and in the program, or why it cannot be compared.

    Args:
        node: a layer of the program's graph.
        module: of the model, with a `weight`.
        call: what the module was given and returned.
        recorded: the values of the program's nodes by name.
    """
    operands, scaled = args_of(node), layer_of(node).scaled
    if "shift" in scaled:
        return "a pass shifted its input or output"
    weight = _weight_as_used(node, module, call)
    if weight is None:
        return "the module computes something else"
    source, divided_by = _quantizer_input(node, recorded)
    if call.input.numel() != recorded[source.name].numel():
        return "its input has another shape in the program"
    given, rows = call.input.reshape(recorded[source.name].shape), torch.ones(())
    if scaled:
        rows, columns = _factors(recorded[operands[1].name], weight, scaled, divided_by)
        channel = 1 - weight.ndim
        if len(columns) != given.shape[channel]:
            return "a scaling pass changed the input of a grouped convolution"
        if divided_by is None:
            given = given / _along(columns, channel, given)
        if "input" in scaled and "output" in scaled and divided_by is None:
            # A factor common to all channels could be on either side: what the program has tells.
            seen = recorded[source.name].double()
            common = (given * seen).sum() / seen.square().sum()
            given, rows = given / common, rows / common
        rows = _along(rows, channel, call.output)
    alone = evaluate(node, {source: given.to(call.input.dtype)}, recorded)
    figures = [
        sqnr_db(call.output, value.reshape(call.output.shape) / rows)
        for value in (alone, recorded[node.name])
    ]
    return figures[0], figures[1]


def _weight_as_used(node: Node, module: Any, call: Call) -> Tensor | None:
    """Return the module's weight as the operator takes it, None where the operator on the module's
    own weight and bias does not give what the module returned."""
    operands: Any = args_of(node)
    bias = getattr(module, "bias", None)
    if (len(operands) > 2 and operands[2] is not None) != (bias is not None):
        return None
    both = (module.weight, module.weight.T) if module.weight.ndim == 2 else (module.weight,)
    for weight in both:  # some keep it as [in, out]
        if weight.shape == shape_of(operands[1]):
            plain = node.target(call.input, weight, bias, *operands[3:])  # type: ignore[operator]
            if plain.shape == call.output.shape and sqnr_db(call.output, plain) > SAME_DB:
                return weight
    return None


def _quantizer_input(layer: Node, recorded: Mapping[str, Any]) -> tuple[Node, Tensor | None]:
    """Return the float value that a layer reads, and the factors of its channels `[C]` that a
    scaling pass put into the quantizer, None where there are none."""
    x = args_of(layer)[0]
    if not is_op(x, ops.dequantize.default) or not is_op(args_of(x)[0], ops.quantize.default):
        return x, None
    source, divisor = args_of(args_of(x)[0])[:2]
    step = args_of(x)[1]
    if is_op(step, ops.guard_scale.default):
        step = args_of(step)[1]
    if divisor is step:
        return source, None
    return source, (recorded[divisor.name] / recorded[step.name]).flatten()


def evaluate(layer: Node, known: Mapping[Node, Tensor], recorded: Mapping[str, Any]) -> Any:
    """Return the value of a layer, with the quantizers in front of it, from known values.

    Args:
        layer: a node of the program's graph.
        known: values of nodes, in the place of what would be computed or was recorded.
        recorded: values by name; what is not among them is computed, and so are quantizers.
    """

    def value(node: Node) -> Any:
        if node in known:
            return known[node]
        if node.name in recorded and not is_op(node, *QUANTIZING):
            return recorded[node.name]
        return evaluate(node, known, recorded)

    return result_of(layer, value)


def _factors(
    found: Tensor, weight: Tensor, scaled: Sequence[str], columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the factors of rows and columns with `found = rows * weight * columns`, by least
    squares where they are not given; ones on a side that no scaling pass touched."""
    found, weight = (w.double().reshape(*w.shape[:2], -1) for w in (found, weight))
    rows, known = found.new_ones(len(found)), columns is not None
    columns = found.new_ones(found.shape[1]) if columns is None else columns.double()
    for _ in range(8 if len(scaled) > 1 else 1):  # in turn, where both are unknown
        if "input" in scaled and not known:
            columns = _ratio(found, weight * rows[:, None, None], (0, 2))
        if "output" in scaled:
            rows = _ratio(found, weight * columns[None, :, None], (1, 2))
    return rows, columns


def _ratio(found: Tensor, weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    ratio = (found * weight).sum(dims) / weight.square().sum(dims)
    return torch.where(ratio.isnan(), 1.0, ratio)  # all zeros: any factor will do


def _along(values: Tensor, dim: int, like: Tensor) -> Tensor:
    """Return `values` in a shape that broadcasts along one dimension of `like`."""
    shape = [1] * like.ndim
    shape[dim] = -1
    return values.reshape(shape)
