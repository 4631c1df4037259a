"""SplitConcatenations: one layer per part of a concatenated input, so that each part has a range of
its own.

    conv(cat([h, skip]), W) + b  ->  conv(h, W[:, :n]) + b + conv(skip, W[:, n:])

At a skip connection two tensors of different scale meet; one range for both leaves the small one a
few codes. Two layers have two activation and two weight quantizers (arXiv:2401.04585; first in
Q-Diffusion, arXiv:2302.04304). The float function is the same but for the order of its sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.dialect import ATEN, Dialect
from fxq.graph import (
    OWNER,
    args_of,
    is_constant,
    is_op,
    is_settled,
    owner_name,
    shape_of,
    weight_of,
)
from fxq.layer import Skip, hand_on, layer_of, set_facts, treat
from fxq.operators import CONV, COPIES, LAYERS, NORMS, RESHAPES, Movement, of, operand, set_operand
from fxq.pipeline import Pass
from fxq.rewriting import add_buffer, erase_dead, insert_call

aten = torch.ops.aten
CAT = aten.cat.default
# Between a concatenation and a layer, these keep a range of their own for each part from being
# needed (a norm), or from being possible without other operators on the parts.
SHAPE_ONLY = of(Movement.SHAPE_ONLY)
BETWEEN = NORMS | RESHAPES | of(
    Movement.RELU, Movement.ACTIVATION, Movement.MUL, Movement.ADD, Movement.TRANSPOSE,
    Movement.SPATIAL_1D, Movement.SPATIAL_2D, Movement.SPATIAL_3D,
)  # fmt: skip


@dataclass(frozen=True)
class SplitConcatenations(Pass):
    """Split every linear and convolution that reads a concatenation of channels.

    The parts are called `<layer>.part_0`, `<layer>.part_1` and so on. A layer that reads one
    through a norm or an activation function stays whole and says so, and so does one whose parts
    are made of the same values, as sines and cosines of a time-step are.
    """

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        """Split what can be split."""
        layers = [n for n in gm.graph.nodes if is_op(n, *LAYERS) and not is_settled(n)]
        weights: dict[tuple[Any, ...], list[Node]] = {}
        modified = False
        for layer in layers:
            source = _through_copies(args_of(layer)[0])
            if not is_op(source, CAT):
                _say_why_not(layer)
                continue
            if why := _why_whole(layer, source):
                treat(layer, type(self).__name__, Skip(why, intended=True), f"not split: {why}")
                continue
            _split(gm, layer, list(args_of(source)[0]), weights)
            modified = True
        if modified:
            erase_dead(gm)
        return PassResult(gm, modified)


def _through_copies(node: Any) -> Any:
    while is_op(node, *COPIES):
        node = args_of(node)[0]
    return node


def _say_why_not(layer: Node) -> None:
    """Say of a layer that reads a concatenation through other operators that it is not split."""
    names: list[str] = []
    node = args_of(layer)[0]
    while is_op(node, *BETWEEN, *COPIES):
        if not is_op(node, *COPIES):
            names.insert(0, node.target._opname)
        node = args_of(node)[0]
    if is_op(node, CAT) and names and _axis(node) == _channels(layer, node):
        why = f"it reads a concatenation through {', '.join(names)}"
        name = SplitConcatenations.__name__
        treat(layer, name, Skip(why, intended=True), f"not split: {why}")


def _axis(cat: Node) -> int:
    axis: int = operand(cat, "dim")
    return axis % len(shape_of(cat))


def _channels(layer: Node, value: Node) -> int:
    """Return the axis of a layer's input along which its weight adds up."""
    return 1 if is_op(layer, *CONV) else len(shape_of(value)) - 1


def _why_whole(layer: Node, cat: Node) -> str:
    """Return why a layer that reads a concatenation is not split, "" where it can be."""
    sizes = [shape_of(part)[_axis(cat)] for part in args_of(cat)[0]]
    if _axis(cat) != _channels(layer, cat):
        return f"its input is put together along axis {_axis(cat)}, which are not its channels"
    if len({_sources(part) for part in args_of(cat)[0]}) < 2:
        return "the parts of its input are made of the same values"
    if is_op(layer, *CONV) and len(shape_of(cat)) < 3:
        return "its input has no batch"
    if is_op(layer, *CONV) and operand(layer, "groups") != 1:
        return "its channels are in groups"
    if not is_constant(args_of(layer)[1]):
        return "its weight is computed at run time"
    if layer_of(layer).weight is not None:
        return "its codes are fixed"
    if not all(isinstance(size, int) for size in sizes):
        return "the sizes of the parts are not fixed"
    return ""


def _sources(node: Node) -> frozenset[Node]:
    """Return the layers and inputs of the model that a value is made of, with no layer between."""
    found: set[Node] = set()
    seen, stack = {node}, [node]
    while stack:
        each = stack.pop()
        if is_op(each, *LAYERS) or each.op == "placeholder":
            found.add(each)
            continue
        if is_op(each, *SHAPE_ONLY):
            continue
        stack += [n for n in each.all_input_nodes if n not in seen]
        seen.update(each.all_input_nodes)
    return frozenset(found)


def _split(
    gm: GraphModule, layer: Node, parts: Sequence[Node], known: dict[tuple[Any, ...], list[Node]]
) -> None:
    """Put the sum of several layers in the place of one."""
    axis = 1 if is_op(layer, *CONV) else len(shape_of(parts[0])) - 1
    sizes = [int(shape_of(part)[axis]) for part in parts]
    whole = args_of(layer)[1]
    if (whole, *sizes) not in known:  # shared by the calls of one module
        known[whole, *sizes] = _weights(gm, layer, sizes)
    total = None
    did = f"one of {len(parts)}, for parts of {' + '.join(map(str, sizes))} channels"
    for index, (part, weight) in enumerate(zip(parts, known[whole, *sizes], strict=True)):
        made = insert_call(layer.target, args_of(layer), layer.kwargs, before=layer)
        set_operand(made, "input", part)
        set_operand(made, "weight", weight)
        if index:  # the bias is of the first
            set_operand(made, "bias", None)
        hand_on(layer, made)
        made.meta[OWNER] = f"{owner_name(layer)}.part_{index}"
        if (mask := layer_of(layer).mask) is not None:
            set_facts(made, mask=mask.split([*sizes], 1)[index].contiguous())
        treat(made, SplitConcatenations.__name__, did, f"part {index} of a concatenated input")
        total = made if total is None else insert_call(aten.add.Tensor, (total, made), before=layer)
    assert total is not None
    layer.replace_all_uses_with(total)
    gm.graph.erase_node(layer)


def _weights(gm: GraphModule, layer: Node, sizes: Sequence[int]) -> list[Node]:
    """Return constants for the parts of a layer's weight."""
    weight = weight_of(layer)
    found = []
    for index, value in enumerate(weight.detach().split([*sizes], 1)):
        value = value.clone(memory_format=torch.contiguous_format)
        if isinstance(weight, nn.Parameter):
            value = nn.Parameter(value, requires_grad=weight.requires_grad)
        found.append(add_buffer(gm, f"{owner_name(layer)}.part_{index}.weight", value, like=layer))
    return found
