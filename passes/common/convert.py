"""Convert: replace observers and float weights by quantize, dequantize and integer codes.

    linear(x, w, b)  ->  linear(dequantize(quantize(x)), dequantize(codes of w), b)

With activations quantized, the layer computes in fp32 whatever the model's dtype and its result is
cast back: that is what an integer kernel does. A weight is quantized once per way of quantizing it,
however many layers share it. A static scale passes through `guard_scale`, so that NaN and Inf of
the float values come back as NaN.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq import numerics
from fxq.dialect import OBSERVED, QUANTIZED, Dialect, observer_of
from fxq.graph import (
    args_of,
    constant_of,
    dtype_of,
    is_constant,
    owner_name,
    shape_of,
    tensor_of,
    weight_of,
)
from fxq.histogram import cut_range
from fxq.identity import TensorKey
from fxq.layer import LAYER, check_weight, layer_of, treat
from fxq.observers import RangeObserver
from fxq.pipeline import Pass
from fxq.rewriting import add_buffer, erase_dead, insert_call, last_of
from fxq.row_choice import insert_tables
from fxq.rows import Rows
from fxq.spec import LayerSpec, MeanSquaredError, QuantSpec, block_of

ops = torch.ops.fxq
ZERO = ".zero_point"
TOGETHER = 1 << 18  # elements of a weight whose ranges are searched together: 1 MB
aten = torch.ops.aten


@dataclass(frozen=True)
class Convert(Pass):
    """Put the numbers in."""

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = QUANTIZED

    def run(self, gm: GraphModule) -> PassResult:
        """Convert every layer that has a `LayerSpec`."""
        conversion = _Conversion(gm, _picked_qparams(gm))
        layers = pending_layers(gm)
        for layer, spec in layers:
            conversion.convert(layer, spec)
        # Observers that only layers read have done their part. They die at the end: so do rows of
        # scales that no edge has taken yet.
        others = [n for n in gm.graph.nodes if n.op == "call_module" and n.users]
        for edge in others:
            conversion.convert_edge(edge)
        erase_dead(gm)
        return PassResult(gm, modified=bool(layers or others))


def described(spec: QuantSpec) -> str:
    """Return a spec's format, and what its range goes by."""
    return f"{spec.format}" if spec.rows is None else f"{spec.format} {spec.rows}"


def pending_layers(gm: GraphModule) -> list[tuple[Node, LayerSpec]]:
    """Return the layers of an observed graph that are to be quantized, with how."""
    records = [(node, layer_of(node)) for node in gm.graph.nodes if LAYER in node.meta]
    return [(node, layer.spec) for node, layer in records if layer.spec and layer.is_pending]


def quantize_weight(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (int8), scale (fp32) and zero-point (int32, None where symmetric) of a weight.

    Args:
        weight: `[N, K]` or `[N, C, ...]`, any float dtype.
        spec: how. A `pair_safe` scale replaces the observer's.
    Raises:
        ValueError: the weight holds NaN or Inf, or the granularity does not divide it.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("expected finite values, found NaN or Inf; repair the checkpoint")
    if spec.pair_safe:
        high = numerics.pair_safe_amax(weight).reshape(-1, *[1] * (weight.ndim - 1))
        low = -high
    elif isinstance(spec.observer, MeanSquaredError):
        low, high = _cheapest_range(weight, spec, spec.observer)
    else:
        observer = RangeObserver(spec, weight.shape, "weight")
        observer(weight)
        low, high = observer.range()
    scale, zero_point = numerics.choose_qparams(
        low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
    )
    zero = None if spec.symmetric else zero_point
    return numerics.quantize(weight, scale, zero, *spec.grid), scale, zero


def _cheapest_range(
    weight: Tensor, spec: QuantSpec, rule: MeanSquaredError
) -> tuple[Tensor, Tensor]:
    """Return the ranges with the smallest error of the weight itself: it is at hand, so unlike an
    activation's they need no histogram, which is exact to a bin and slow for many scales."""
    weight, block = weight.detach().float(), block_of(spec.granularity, weight.ndim)
    low, high = numerics.block_amin_amax(weight, block)
    # Rows with ranges of their own are searched a few at a time, while caches hold them.
    per_row = max(1, weight.numel() // max(1, len(weight)))
    n_rows = max(1, TOGETHER // per_row) if len(low) == len(weight) else len(weight)
    pieces = zip(weight.split(n_rows), low.split(n_rows), high.split(n_rows), strict=True)
    found = [_searched(*piece, spec, rule) for piece in pieces]
    lows, highs = zip(*found, strict=True)
    return torch.cat(lows), torch.cat(highs)


def _searched(
    weight: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, rule: MeanSquaredError
) -> tuple[Tensor, Tensor]:
    block = block_of(spec.granularity, weight.ndim)

    def cost(low: Tensor, high: Tensor) -> Tensor:
        scale, zero = numerics.choose_qparams(
            low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
        )
        codes = numerics.quantize(weight, scale, zero, *spec.grid)
        value = numerics.dequantize(codes, scale, zero, torch.float32)
        return numerics.block_mean((value - weight).abs() ** rule.p, block)

    return cut_range(low, high, rule.steps, cost)


def _picked_qparams(gm: GraphModule) -> dict[str, Node]:
    """Insert the scales and zero-points that a row is chosen of; by the observer's name."""
    wanted: dict[str, tuple[Node, Rows, Tensor]] = {}
    for edge in list(gm.graph.nodes):
        observer = observer_of(gm, edge)
        if observer is not None and (rows := observer.spec.rows) is not None:
            scale, zero = observer.qparams()
            wanted[edge.target] = edge.args[1], rows, scale
            if not observer.spec.symmetric:
                wanted[f"{edge.target}{ZERO}"] = edge.args[1], rows, zero
    return insert_tables(gm, wanted)


class _Conversion:
    """One run of `Convert`: what has been quantized so far, so that nothing is quantized twice."""

    def __init__(self, gm: GraphModule, picked: Mapping[str, Node]) -> None:
        self.gm, self.picked = gm, picked
        self.weights: dict[tuple[tuple[TensorKey | None, ...], QuantSpec, torch.dtype], Node] = {}
        self.inputs: dict[tuple[Node, QuantSpec], Node] = {}

    def convert(self, layer: Node, spec: LayerSpec) -> None:
        """Rewrite one layer's operands, and cast its result where the dtype changes."""
        model_dtype = dtype_of(layer)
        compute = model_dtype if spec.activation is None else torch.float32
        operands = list(layer.args)
        operands[1] = self.weight(layer, spec.weight, compute)
        if spec.activation is not None:
            operands[0] = self.input(layer, spec.activation)
        if len(operands) > 2 and isinstance(operands[2], Node) and compute != model_dtype:
            operands[2] = insert_call(
                aten._to_copy.default, (operands[2],), {"dtype": compute}, before=layer
            )
        layer.args = tuple(operands)
        if compute != model_dtype:
            layer.meta["val"] = layer.meta["val"].to(compute)
            result = insert_call(
                aten._to_copy.default, (layer,), {"dtype": model_dtype}, after=layer
            )
            layer.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
        format = " x ".join(
            str(model_dtype).removeprefix("torch.") if part is None else described(part)
            for part in (spec.activation, spec.weight)
        )
        treat(layer, Convert.__name__, format, format=format)

    def convert_edge(self, edge: Node) -> None:
        """Quantize an observed edge that no layer's input is: all its readers see the result."""
        observer = observer_of(self.gm, edge)
        assert observer is not None
        source = edge.args[0]
        assert isinstance(source, Node)
        spec = observer.spec
        if dtype_of(edge) == torch.float32 and (read := self.inputs.get((edge, spec))):
            edge.replace_all_uses_with(read)  # a layer reads it, too
            return
        qparams = self.qparams_of(edge, edge, str(edge.target).removesuffix("_observer"))
        after = last_of(source, *qparams)
        codes = insert_call(ops.quantize.default, (source, *qparams, *spec.grid), after=after)
        guarded = (self.guarded(source, qparams[0]), qparams[1])
        value = insert_call(ops.dequantize.default, (codes, *guarded, dtype_of(edge)), after=codes)
        edge.replace_all_uses_with(value)

    def weight(self, layer: Node, spec: QuantSpec, dtype: torch.dtype) -> Node:
        """Return the dequantized weight of `layer`, shared with every layer that has the same one
        and the same codes for it, where a method has fixed them."""
        value, fixed, name = weight_of(layer), layer_of(layer).weight, owner_name(layer)
        given = None if fixed is None else (fixed.codes, fixed.scale, fixed.zero_point)
        keys = (None if part is None else TensorKey.of(part) for part in given or (value,))
        key = ((*keys,), spec, dtype)
        try:
            check_weight(layer_of(layer), value)
            found = None if key in self.weights else given or quantize_weight(value, spec)
        except ValueError as error:
            raise ValueError(f"weight of {name}: {error}") from error
        if found is not None:
            codes, scale, zero = found
            # Buffers go to the front of the graph, each before the last: after the first, all are
            # there.
            codes_node = add_buffer(self.gm, f"{name}.weight_codes", codes, like=layer)
            qparams = self.qparams(layer, f"{name}.weight", scale, zero)
            self.weights[key] = insert_call(
                ops.dequantize.default, (codes_node, *qparams, dtype), after=codes_node
            )
        return self.weights[key]

    def input(self, layer: Node, spec: QuantSpec) -> Node:
        """Return the dequantized input of `layer`, shared by all that read the same edge alike."""
        edge = layer.args[0]
        assert isinstance(edge, Node)
        if (edge, spec) not in self.inputs:
            find = self.dynamic_qparams if spec.dynamic else self.static_qparams
            source, scale, zero = find(layer, edge, spec)
            source, divisor = self.absorb_product(layer, source, scale)
            codes = insert_call(
                ops.quantize.default,
                (source, divisor, zero, *spec.grid),
                after=last_of(source, divisor, zero),
                like=layer,
            )
            if not spec.dynamic:
                scale = self.guarded(source, scale)
            self.inputs[edge, spec] = insert_call(
                ops.dequantize.default, (codes, scale, zero, torch.float32), after=codes
            )
        return self.inputs[edge, spec]

    def static_qparams(
        self, layer: Node, edge: Node, spec: QuantSpec
    ) -> tuple[Node, Node, Node | None]:
        """Return the observed edge with the range its observer found."""
        source = edge.args[0]
        assert isinstance(source, Node)
        return source, *self.qparams_of(edge, layer, f"{owner_name(layer)}.input")

    def dynamic_qparams(
        self, layer: Node, edge: Node, spec: QuantSpec
    ) -> tuple[Node, Node, Node | None]:
        """Return the edge with a range computed from it at run time."""
        block = block_of(spec.granularity, len(shape_of(edge)), dynamic=True)
        pair = insert_call(
            ops.choose_qparams.default,
            (edge, block, spec.quant_min, spec.quant_max, spec.symmetric),
            after=edge,
            like=layer,
        )
        zero = None
        if not spec.symmetric:
            zero = insert_call(operator.getitem, (pair, 1), after=pair)
        return edge, insert_call(operator.getitem, (pair, 0), after=pair), zero

    def guarded(self, source: Node, scale: Node) -> Node:
        """Return a static scale that is NaN where a row of `source` is not finite."""
        if is_constant(source):  # finite, or no input could give a finite result
            return scale
        after = last_of(source, scale)
        return insert_call(ops.guard_scale.default, (source, scale), after=after)

    def absorb_product(self, layer: Node, source: Node, scale: Node) -> tuple[Node, Node]:
        """Return what to quantize and with which scale: a product with a constant per channel that
        a scaling pass put in front of a static quantizer becomes part of the scale."""
        if not layer_of(layer).divided or scale.op != "get_attr":
            return source, scale
        step, factor = tensor_of(self.gm, scale), constant_of(args_of(source)[1])
        if step.numel() > 1:
            return source, scale
        name = f"{owner_name(layer)}.input_channel_scale"
        divisor = add_buffer(self.gm, name, step / factor.float(), like=layer)
        return args_of(source)[0], divisor

    def qparams_of(self, edge: Node, owner: Node, name: str) -> tuple[Node, Node | None]:
        """Return the scale and zero-point that an observer found, or the rows of them that hold."""
        target = str(edge.target)
        if target in self.picked:
            return self.picked[target], self.picked.get(f"{target}{ZERO}")
        observer = observer_of(self.gm, edge)
        assert observer is not None
        scale, zero = observer.qparams()
        return self.qparams(owner, name, scale, None if observer.spec.symmetric else zero)

    def qparams(
        self, layer: Node, name: str, scale: Tensor, zero: Tensor | None
    ) -> tuple[Node, Node | None]:
        """Register a scale and, where there is one, a zero-point."""
        scale_node = add_buffer(self.gm, f"{name}_scale", scale, like=layer)
        if zero is None:
            return scale_node, None
        return scale_node, add_buffer(self.gm, f"{name}_zero_point", zero, like=layer)
