"""QuantizeResiduals: what is added to a convolution's output is kept as codes.

    y = act(conv(x) + r)   ->   y = act(conv(x) + dequantize(quantize(r)))

Layers read 8-bit codes once `InsertObservers` has passed; the residual stream beside them stays
fp32, four times the memory. In a residual network the next layer reads most of that stream as codes
already: this pass lets the addition read the same ones, so that nothing in fp32 is left to write. A
kernel takes them in as it takes in the addition. It costs a rounding for each addition.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import kind_of
from fxq.dialect import OBSERVED, Dialect, observer_of
from fxq.graph import dtype_of, is_constant, is_op, owner_name, shape_of
from fxq.layer import layer_of, treat
from fxq.observers import RangeObserver
from fxq.operators import ADD
from fxq.pipeline import Pass
from fxq.rewriting import insert_module
from fxq.spec import PerTensor, QuantSpec


@dataclass(frozen=True)
class QuantizeResiduals(Pass):
    """Observe what additions add to the outputs of convolutions that are to be quantized.

    Which range it has is the spec of the convolution's own input: static, with one scale. Others
    keep their residual in float, as do additions that broadcast or that add a constant.
    """

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def run(self, gm: GraphModule) -> PassResult:
        """Insert the observers, one for all that read an edge with the same spec."""
        found = list(_residuals(gm))
        for add, layer, residual, spec in found:
            observer = _observer(gm, residual, spec)
            if observer is None:
                name = f"{owner_name(layer)}.residual"
                module = RangeObserver(spec, shape_of(residual), name)
                observer = insert_module(gm, f"{name}_observer", module, residual)
            add.replace_input_with(residual, observer)
            treat(layer, type(self).__name__, f"what is added to it is quantized to {spec.format}")
        return PassResult(gm, modified=bool(found))


def _residuals(gm: GraphModule) -> Iterator[tuple[Node, Node, Node, QuantSpec]]:
    """Yield additions, the convolution whose output they add to, what they add and how it is to be
    quantized."""
    for add in gm.graph.nodes:
        if not is_op(add, *ADD) or add.kwargs or len(set(add.all_input_nodes)) != 2:
            continue
        for layer, residual in (add.args, add.args[::-1]):
            spec = _spec_of(layer)
            if spec is not None and _is_residual(residual, layer):
                yield add, layer, residual, spec
                break


def _spec_of(layer: Node) -> QuantSpec | None:
    """Return how the input of a convolution is to be quantized, None where this pass has nothing to
    do with it."""
    record = layer_of(layer)
    if kind_of(layer) != "conv" or not record.is_pending or len(layer.users) > 1:
        return None
    spec = record.spec.activation if record.spec is not None else None
    one = spec is not None and spec.granularity == PerTensor() and spec.rows is None
    return spec if one and spec is not None and not spec.dynamic else None


def _is_residual(node: Node, layer: Node) -> bool:
    """Tell whether a node is an activation in float of the shape and dtype of a layer's output."""
    if is_constant(node) or node.op == "call_module":
        return False
    return shape_of(node) == shape_of(layer) and dtype_of(node) == dtype_of(layer)


def _observer(gm: GraphModule, edge: Node, spec: QuantSpec) -> Node | None:
    """Return the observer of an edge with a spec."""
    for user in edge.users:
        observer = observer_of(gm, user)
        if observer is not None and observer.spec == spec:
            return user
    return None
