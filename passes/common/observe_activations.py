"""ObserveActivations: quantize what flows between layers too, not only what they read.

Layers read int8 once `InsertObservers` has passed; sums, concatenations and the outputs of layers
stay float between them. Papers that quantize every activation give numbers of another network:
this pass makes it. What it adds is simulated: no kernel is faster for it.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import kind_of
from fxq.dialect import OBSERVED, Dialect
from fxq.errors import FxqWarning
from fxq.graph import args_of, dtype_of, is_constant, is_op, owner_name, shape_of
from fxq.layer import Skip, layer_of, treat
from fxq.observers import RangeObserver
from fxq.operators import (
    ADD,
    ADDMM,
    CONV,
    COPIES,
    DIV,
    MATMUL,
    MUL,
    RESHAPES,
    SOFTMAX,
    Movement,
    multiplied,
    of,
)
from fxq.pipeline import Pass
from fxq.rewriting import insert_module
from fxq.row_choice import fitting_index
from fxq.rows import ByLength, ByPosition
from fxq.spec import PerChannel, QuantSpec

aten = torch.ops.aten
NONLINEAR = of(Movement.ACTIVATION, Movement.RELU, Movement.MUL)  # a product may be a gate's
CHANNEL_NORM = of(Movement.CHANNEL_NORM)
WHERE, MASKED_FILL = of(Movement.WHERE), of(Movement.MASKED_FILL)
Kind = Literal["layer", "sum", "cat", "constant", "scores", "operand", "probabilities"]


OF_PRODUCTS: tuple[Kind, ...] = ("operand", "probabilities")  # only products read these quantized
TERMS: tuple[Kind, ...] = ("layer", "cat", "sum")  # what may be a term of a sum
MOVED = RESHAPES | COPIES | of(Movement.TRANSPOSE, Movement.EXPAND)


@dataclass(frozen=True)
class ObserveActivations(Pass):
    """Observe more edges, with everything that reads them.

    Args:
        spec: how these edges are quantized; static.
        kinds: which edges. "layer": outputs of quantized layers, but for those that only an
            activation function reads; "sum": sums of activations; "cat": concatenations;
            "constant": parameters that are added to activations; "scores": what a softmax reads,
            before bias and mask. Not unless asked for: "operand", what products of two activations
            multiply, and "probabilities", those operands that come from a softmax, which are none
            of the former (`DecomposeAttention` writes attention out as such products). Only the
            products read these quantized, which compute in float.
        by_channel: which of these kinds have a range for each channel instead of the spec's
            granularity: a residual stream may have channels a hundred times as large as the
            others, and no product reads it, so a scale per channel needs no other kernel. Edges
            without tokens or positions, `[B, C]`, keep the spec's: one value for each image says
            little of a channel's range.
        terms: observe outputs of layers, concatenations and sums that only sums read, at once or
            through reshapes and concatenations. Without, such a term stays as it is accumulated,
            and what it becomes part of is rounded once.
    """

    spec: QuantSpec
    kinds: tuple[Kind, ...] = ("layer", "sum", "cat", "constant", "scores")
    by_channel: tuple[Kind, ...] = ()
    terms: bool = True

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def run(self, gm: GraphModule) -> PassResult:
        """Insert the observers."""
        find: Mapping[str, Callable[[GraphModule], Iterable[Node]]] = {
            "layer": _layer_outputs,
            "sum": _sums,
            "cat": _concatenations,
            "constant": _added_constants,
            "scores": _scores,
            "operand": _operands,
            "probabilities": _probabilities,
        }
        edges: dict[Node, str] = {}  # why each stays float, if it does
        # Products last: what they read may be observed by then.
        for products in (False, True):
            kinds = [kind for kind in self.kinds if (kind in OF_PRODUCTS) is products]
            found: dict[Node, Kind] = {}
            for kind in kinds:
                for edge in find[kind](gm):
                    found.setdefault(edge, kind)
            # How each is quantized is decided before observers stand between them.
            specs = {
                edge: self._spec_of(edge, kind)
                for edge, kind in found.items()
                if self.terms or kind not in TERMS or not _is_term(edge)
            }
            edges |= {edge: self._observe(gm, edge, s, products) for edge, s in specs.items()}
        left = {edge: why for edge, why in edges.items() if why}
        if left:
            listing = "; ".join(f"{edge.name}: {why}" for edge, why in left.items())
            warnings.warn(
                f"ObserveActivations left {len(left)} of {len(edges)} edges in float: {listing}",
                FxqWarning,
                stacklevel=2,
            )
        return PassResult(gm, modified=len(left) < len(edges))

    def _spec_of(self, edge: Node, kind: Kind) -> QuantSpec:
        axis, dims = _channel_axis(edge, kind), len(shape_of(edge))
        if kind not in self.by_channel or dims < max(-axis, 2 if kind == "constant" else 3):
            return self.spec
        return replace(self.spec, granularity=PerChannel(axis))

    def _observe(self, gm: GraphModule, edge: Node, spec: QuantSpec, only_products: bool) -> str:
        """Observe an edge, or return why it stays float."""
        readers = [user for user in edge.users if user.op != "call_module"]
        if only_products:
            readers = [user for user in readers if _is_product(user)]
        name = f"{owner_name(edge)}.{edge.name}"
        if isinstance(spec.granularity, PerChannel):
            size = shape_of(edge)[spec.granularity.axis]
            if not isinstance(size, int):
                return f"a range per channel needs a fixed number of them, found {size}"
        module = RangeObserver(spec, shape_of(edge), name)
        index, rows = list[Node](), spec.rows
        if rows is not None:
            if isinstance(rows, ByPosition | ByLength) and kind_of(edge) == "conv":
                return f"rows {rows} need [..., token, channel], found a convolution"
            found, why = fitting_index(gm, rows, edge)
            if found is None:
                return why
            index = [found]
        observed = insert_module(gm, f"{edge.name}_observer", module, edge, *index)
        # A layer's own observer keeps reading the edge: quantizing twice would round twice.
        for user in readers:
            user.replace_input_with(edge, observed)
            if only_products:
                did = f"{edge.name} is quantized to {self.spec.format}"
                treat(user, type(self).__name__, did)
                why = "its operands are quantized, the product is in float"
                treat(user, type(self).__name__, Skip(why, intended=True))
        return ""


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and dtype_of(node).is_floating_point and value.ndim > 0


def _read_by_others(node: Node) -> bool:
    """Tell whether anything but observers reads a node."""
    return any(user.op != "call_module" for user in node.users)


def _layer_outputs(gm: GraphModule) -> Iterable[Node]:
    for node in gm.graph.nodes:
        inner = [user for user in node.users if not is_op(user, *NONLINEAR)]
        if layer_of(node).is_pending and inner and _read_by_others(node):
            yield node


def _sums(gm: GraphModule) -> Iterable[Node]:
    masked = {term for scores in _scores(gm) for term in _between(scores)}
    for node in gm.graph.nodes:
        if not is_op(node, *ADD) or node.kwargs or not _is_float(node) or node in masked:
            continue
        scalar = any(isinstance(arg, int | float) for arg in node.args)
        if not scalar and _read_by_others(node):
            yield node


def _concatenations(gm: GraphModule) -> Iterable[Node]:
    for node in gm.graph.nodes:
        if is_op(node, aten.cat.default) and _is_float(node) and _read_by_others(node):
            yield node


def _added_constants(gm: GraphModule) -> Iterable[Node]:
    for node in _sums(gm):
        for arg in node.all_input_nodes:
            if is_constant(arg) and _is_float(arg):
                yield arg


def _scores(gm: GraphModule) -> Iterable[Node]:
    for node in gm.graph.nodes:
        if not is_op(node, *SOFTMAX):
            continue
        source = node.args[0]
        while is_op(source, *ADD, *MASKED_FILL, *WHERE):
            source = source.args[1] if is_op(source, *WHERE) else source.args[0]
        if is_op(source, *MUL, *DIV, *MATMUL):
            yield source


def _between(scores: Node) -> Iterable[Node]:
    """Yield the sums between scores and softmax."""
    for user in scores.users:
        if is_op(user, *ADD):
            yield user
            yield from _between(user)


def _is_term(node: Node) -> bool:
    """Tell whether a node becomes part of sums and of nothing else."""
    if not node.users:
        return False
    return all(
        is_op(user, *ADD) or (is_op(user, aten.cat.default, *MOVED) and _is_term(user))
        for user in node.users
    )


def _channel_axis(edge: Node, kind: Kind) -> int:
    """Return the axis of an edge's channels, counted from the last: the second of
    `[B, C, *spatial]` where a convolution or a norm over channels is next to it, else the last."""
    if kind == "constant":  # of the sum that it is added in
        return _channel_axis(next(user for user in edge.users if is_op(user, *ADD)), "sum")
    near = {edge, *edge.all_input_nodes, *edge.users}
    for node in tuple(near):  # observers and other sums stand between
        if node.op == "call_module" or is_op(node, *ADD):
            near |= {*node.all_input_nodes, *node.users}
    return 1 - len(shape_of(edge)) if any(is_op(n, *CONV, *CHANNEL_NORM) for n in near) else -1


def _is_product(node: Node) -> bool:
    """Tell whether a node multiplies two activations."""
    if not is_op(node, *MATMUL, *ADDMM):
        return False
    return all(_is_float(x) and not is_constant(x) for x in multiplied(node))


def _unmoved(node: Node) -> Node:
    """Return what a node is a view or copy of."""
    while is_op(node, *MOVED):
        node = args_of(node)[0]
    return node


def _read_by_products(gm: GraphModule) -> Iterable[Node]:
    """Yield what products of two activations read and no observer gives."""
    for node in gm.graph.nodes:
        if _is_product(node):
            yield from (x for x in multiplied(node) if _unmoved(x).op != "call_module")


def _operands(gm: GraphModule) -> Iterable[Node]:
    return (x for x in _read_by_products(gm) if not is_op(_unmoved(x), *SOFTMAX))


def _probabilities(gm: GraphModule) -> Iterable[Node]:
    return (x for x in _read_by_products(gm) if is_op(_unmoved(x), *SOFTMAX))
