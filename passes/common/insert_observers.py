"""InsertObservers: decide how each layer is quantized, and watch the edges whose range must be
known.

Layers are the operators with a weight: linear and convolution. Each gets the first entry of
`overrides` that matches it, or `default`; what is left alone has the reason in its record, and the
report shows it. One observer serves all layers that read the same edge the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import UNKNOWN, is_unknown, kind_of
from fxq.dialect import ATEN, OBSERVED, Dialect
from fxq.errors import UnsupportedError, counted, did_you_mean
from fxq.graph import (
    is_constant,
    is_settled,
    owner_name,
    shape_of,
    val_of,
    weight_of,
)
from fxq.layer import OVERRIDE, Skip, treat
from fxq.observers import RangeObserver
from fxq.passes.common.layer_choice import overridden
from fxq.pipeline import Pass
from fxq.rewriting import insert_module
from fxq.row_choice import assumed, fitting_index, why_not_counted
from fxq.rows import EVERY, ByLength, ByPosition, ByStep
from fxq.spec import LayerSpec, PerTensor, PerToken, QuantSpec, block_of, scale_shape

Target = Literal["linear", "conv"]
TARGETS: tuple[Target, ...] = get_args(Target)
FEWEST_CHANNELS = 4  # of a linear's input
NO_TOKENS = "one scale for all rows: no token axis in {}"
# Kinds of operators whose constants are no matrix that multiplies rows.
NO_LINEAR = frozenset({
    None, "linear", "conv", "transposed conv", "attention", "_convolution", "conv_tbc",
})  # fmt: skip

Override = tuple[str, LayerSpec | None]


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Choose a `LayerSpec` for every layer and observe the inputs that need a static range.

    Args:
        default: how a layer is quantized unless an override says otherwise; None keeps it float.
        targets: kinds of operators `default` applies to.
        overrides: (pattern, spec) pairs. A pattern is `FIRST`, `LAST`, `DEPTHWISE`,
            `first_of(input)` or a qualified module name with shell wildcards (`"blocks.0.*"`); a
            spec of None keeps the layer float. The first match wins.
        partial: the graph may be a part of a model: patterns that match nothing in it are left out.
    """

    default: LayerSpec | None
    targets: tuple[Target, ...] = ("linear",)
    overrides: tuple[Override, ...] = ()
    partial: bool = False

    def __post_init__(self) -> None:
        if type(self.targets) is not tuple:
            raise TypeError(f"targets: expected a tuple of kinds, found {self.targets!r}")
        for kind in self.targets:
            if kind not in TARGETS:
                raise ValueError(f"targets: no kind {kind!r}; {did_you_mean(kind, TARGETS)}")
        for entry in (("default", self.default), *self.overrides):
            pair = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, entry)
            if not isinstance(pair[0], str) or not isinstance(pair[1], LayerSpec | None):
                raise TypeError(
                    "InsertObservers: expected a LayerSpec or None as default and (pattern, "
                    f"LayerSpec or None) pairs as overrides, found {entry!r}"
                )

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = OBSERVED

    @property
    def needs_program(self) -> bool:
        """Whether a range goes by a step that the user counts."""
        specs = [self.default, *(spec for _, spec in self.overrides)]
        activations = [spec.activation for spec in specs if spec is not None]
        return any(a is not None and isinstance(a.rows, ByStep) for a in activations)

    def run(self, gm: GraphModule) -> PassResult:
        """Mark layers and insert observers."""
        layers = [n for n in gm.graph.nodes if kind_of(n) in TARGETS]
        selected = overridden(layers, self.overrides, self.partial)
        layers = [n for n in layers if not is_settled(n)]
        observers: dict[tuple[Node, QuantSpec], Node] = {}
        modified, name = False, type(self).__name__
        for layer in layers:
            if layer in selected:
                pattern, spec = selected[layer]
            else:
                pattern, spec = None, self.default if kind_of(layer) in self.targets else None
            if spec is None:
                why = f"this recipe quantizes {', '.join(self.targets)} only"
                if pattern:
                    why = f"{OVERRIDE}{pattern!r}"
                elif self.default is None:
                    why = f"{OVERRIDE}default=None"
                treat(layer, name, Skip(why, intended=True))
                continue
            if pattern is None and (few := _too_few(layer)):
                treat(layer, name, Skip(few, intended=True))
                continue
            try:
                fitted, remark = _fitted(layer, spec)
            except (ValueError, UnsupportedError) as error:
                treat(layer, name, Skip(str(error), intended=False))
                continue
            index, why, taken = _index(gm, layer, fitted)
            if why:
                treat(layer, name, Skip(why, intended=False))
                continue
            remark = "; ".join(filter(None, (remark, taken)))
            treat(layer, name, "to be quantized", remark, spec=fitted)
            modified = True
            if fitted.activation is not None and not fitted.activation.dynamic:
                _observe(gm, layer, fitted.activation, index, observers)
        self._skip_others(gm)
        return PassResult(gm, modified)

    def _skip_others(self, gm: GraphModule) -> None:
        """Say of what multiplies and is no layer why it stays as it is."""
        name = type(self).__name__
        for node in gm.graph.nodes:
            kind = None if is_settled(node) else kind_of(node)
            if kind is None:
                continue
            if is_unknown(node):
                treat(node, name, UNKNOWN)
            elif kind not in NO_LINEAR and _has_weight(node) and "linear" in self.targets:
                why = f"its weight multiplies as {kind}, in a form that is not a linear"
                treat(node, name, Skip(why, intended=False))
            elif kind not in TARGETS:
                treat(node, name, Skip(f"this recipe does not quantize {kind}", intended=True))


def _has_weight(node: Node) -> bool:
    """Tell whether a product is one of a constant and something that is not, where its groups end
    aside."""
    values = [operand for operand in node.all_input_nodes if not _is_index(operand)]
    return len({is_constant(value) for value in values}) == 2


def _is_index(node: Node) -> bool:
    return getattr(val_of(node), "dtype", None) in (torch.int32, torch.int64)


def _index(gm: GraphModule, layer: Node, spec: LayerSpec) -> tuple[Node | None, str, str]:
    """Return the index that chooses a row of the layer's input range, None where there is one row;
    why it does not fit, and what is assumed where it does."""
    if spec.activation is None or spec.activation.rows is None:
        return None, "", ""
    rows, edge = spec.activation.rows, layer.all_input_nodes[0]
    index, why = fitting_index(gm, rows, edge)
    return index, why, "" if index is None else assumed(shape_of(index), shape_of(edge))


def _too_few(layer: Node) -> str:
    """Say why a linear of coordinates stays float; "" for other layers.

    One to three numbers per row are places or times, of which Fourier features are made: an error
    of a code there is one of many radians, and such a product takes no time.
    """
    if kind_of(layer) != "linear" or not is_constant(layer.args[1]):
        return ""
    n_channels = weight_of(layer).shape[1]
    if n_channels >= FEWEST_CHANNELS:
        return ""
    found = counted(n_channels, "input channel")
    return f"it has {found}, as coordinates have; fewer than {FEWEST_CHANNELS} are not quantized"


def _fitted(layer: Node, spec: LayerSpec) -> tuple[LayerSpec, str]:
    """Return `spec` as it can be applied to `layer` and what to know about it, or raise with the
    reason why it cannot."""
    if not is_constant(layer.args[1]):
        raise UnsupportedError("its weight is computed at run time")
    weight = weight_of(layer)
    scale_shape(weight.shape, block_of(spec.weight.granularity, weight.ndim))
    activation, remark = spec.activation, ""
    if activation is None:
        return spec, remark
    shape = shape_of(layer.args[0])
    if activation.granularity == PerToken():
        if kind_of(layer) == "conv":
            raise UnsupportedError("PerToken() needs [..., token, channel], found a convolution")
        if not activation.dynamic and (len(shape) < 3 or not isinstance(shape[-2], int)):
            remark = f"one scale for all rows: no fixed token axis in {list(shape)}"
            activation = replace(activation, granularity=PerTensor())
    if isinstance(activation.rows, ByPosition) and activation.rows.count == EVERY:
        activation, remark = _counted(activation, activation.rows, shape)
    elif isinstance(activation.rows, ByLength) and len(shape) < 3:
        activation, remark = replace(activation, rows=None), NO_TOKENS.format(list(shape))
    block = block_of(activation.granularity, len(shape), dynamic=activation.dynamic)
    sizes = scale_shape(shape, block)
    if not activation.dynamic and any(not isinstance(size, int) for size in sizes):
        raise UnsupportedError(
            f"a static {activation.granularity} needs fixed sizes, found {list(shape)}"
        )
    if activation.rows is not None and (why := why_not_counted(shape, activation.rows)):
        raise UnsupportedError(why)
    if isinstance(activation.rows, ByPosition | ByLength) and kind_of(layer) == "conv":
        raise UnsupportedError(
            f"rows {activation.rows} need [..., token, channel], found a convolution"
        )
    return replace(spec, activation=activation), remark


def _counted(spec: QuantSpec, rows: ByPosition, shape: Sequence[Any]) -> tuple[QuantSpec, str]:
    """Return a spec with a row for every position of an edge, and what to know about it."""
    if len(shape) < 3:
        return replace(spec, rows=None), NO_TOKENS.format(list(shape))
    if not isinstance(shape[-2], int):
        raise UnsupportedError(
            f"rows {rows} need to know how many positions there are, found a free number of tokens "
            f"in {list(shape)}; give ByPosition(count)"
        )
    return replace(spec, rows=replace(rows, count=shape[-2])), ""


def _observe(
    gm: GraphModule,
    layer: Node,
    spec: QuantSpec,
    index: Node | None,
    observers: dict[tuple[Node, QuantSpec], Node],
) -> None:
    edge = layer.args[0]
    assert isinstance(edge, Node)
    if (edge, spec) not in observers:
        module = RangeObserver(spec, shape_of(edge), owner_name(layer))
        name = f"{owner_name(layer)}.input_observer"
        reads = [edge] if index is None else [edge, index]
        observers[edge, spec] = insert_module(gm, name, module, *reads)
    layer.replace_input_with(edge, observers[edge, spec])
