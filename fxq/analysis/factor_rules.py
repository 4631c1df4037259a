"""What each operator does to the labels of factors; see `factors.py`.

An operator without a rule here fixes what it reads at one. A wrong rule would change the float
function; a missing one only costs a site. `flow.shifts` tells whether labels stand for shifts.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.analysis import following
from fxq.analysis.factors import UNIT, ZERO, ChannelFlow, Slot
from fxq.analysis.following import Labels, by_movement
from fxq.analysis.labels import compact, settle, sizes_of
from fxq.graph import args_of, constant_of, is_constant, is_op
from fxq.identity import TensorKey
from fxq.operators import SPATIAL_AXES, Movement, movement_of, operand


def fix_inputs(flow: ChannelFlow, node: Node) -> Labels:
    """The rule of operators without one."""
    for read in node.all_input_nodes:
        flow.fix(flow.labels.get(read), f"{op_name(node)} also reads it")
    flow.why[node] = f"no factor passes through {op_name(node)}"
    return None


def linear(flow: ChannelFlow, node: Node) -> Labels:
    """A weight `[N, K]` has K input variables and N output variables."""
    x, weight = args_of(node)[:2]
    if not _has_constants(node):
        return fix_inputs(flow, node)
    n, k = sizes_of(weight)
    flow.consume(flow.slot(node, "in", k, weight_key(weight)), x, -1)
    out = flow.slot(node, "out", n, weight_key(weight))
    flow.traits[node] = frozenset()
    return out.ids.expand(sizes_of(node))


def conv(flow: ChannelFlow, node: Node) -> Labels:
    """A weight `[N, C / groups, ...]` has C input variables and N output variables."""
    x, weight = args_of(node)[:2]
    if operand(node, "transposed", False) or not _has_constants(node):
        return fix_inputs(flow, node)
    spatial = len(sizes_of(weight)) - 2
    dim = len(sizes_of(x)) - spatial - 1
    columns = flow.slot(node, "in", sizes_of(x)[dim], weight_key(weight))
    flow.consume(columns, x, dim)
    padding = operand(node, "padding")
    if flow.shifts and padding != "valid" and (padding == "same" or any(padding)):
        flow.fix(columns.ids, f"the zero padding of {op_name(node)} does not shift")
    out = flow.slot(node, "out", sizes_of(weight)[0], weight_key(weight))
    flow.traits[node] = frozenset()
    return out.ids.reshape(-1, *[1] * spatial).expand(sizes_of(node))


def _has_constants(layer: Node) -> bool:
    bias = operand(layer, "bias")
    return is_constant(operand(layer, "weight")) and (bias is None or is_constant(bias))


def norm(flow: ChannelFlow, node: Node) -> Labels:
    """A norm has output variables only: it undoes what is done to its input."""
    fix_inputs(flow, node)
    shape, last = sizes_of(node), movement_of(node) is Movement.LAST_NORM
    affine = [arg for arg in node.args[1:] if isinstance(arg, Node)]
    if (last and len(operand(node, "normalized_shape")) != 1) or not all(map(is_constant, affine)):
        return None
    out = flow.slot(node, "out", shape[-1] if last else shape[1], node)
    labels = out.ids if last else out.ids.reshape(-1, *[1] * (len(shape) - 2))
    flow.traits[node] = frozenset()
    return labels.expand(shape)


def copy(flow: ChannelFlow, node: Node) -> Labels:
    labels = flow.tensor(args_of(node)[0])
    is_float = node.meta["val"].dtype.is_floating_point
    return labels if labels is not None and is_float else fix_inputs(flow, node)


def neg(flow: ChannelFlow, node: Node) -> Labels:
    return (fix_inputs if flow.shifts else copy)(flow, node)


def relu(flow: ChannelFlow, node: Node) -> Labels:
    """A positive factor passes through, a shift does not."""
    flow.traits[node] |= {"relu"}
    return (fix_inputs if flow.shifts else copy)(flow, node)


def pad(flow: ChannelFlow, node: Node) -> Labels:
    """Zeros can be scaled, and do not shift."""
    if not any(operand(node, "pad")):
        return following.keep(flow, node)
    zeros = operand(node, "mode", "constant") == "constant" and not operand(node, "value")
    if flow.shifts or not zeros:
        return fix_inputs(flow, node)
    return following.pad(flow, node, ZERO)


def add(flow: ChannelFlow, node: Node) -> Labels:
    """Both operands of a sum are scaled alike; one of them takes the shift."""
    a, b = args_of(node)[:2]
    if operand(node, "alpha") != 1 or (flow.shifts and movement_of(node) is Movement.SUB):
        return fix_inputs(flow, node)
    if flow.shifts:
        return _add_shifts(flow, node, a, b)
    return _add_scales(flow, node, *((a, b) if _numel(a) >= _numel(b) else (b, a)))


def _add_scales(flow: ChannelFlow, node: Node, big: Any, small: Any) -> Labels:
    x, y = flow.tensor(big), flow.tensor(small)
    rewrite = _is_float(small) and (
        is_constant(small) or (_numel(small) < _numel(big) and not _is_free(small))
    )
    if x is None or not isinstance(small, Node) or (y is None and not rewrite):
        return fix_inputs(flow, node)
    if rewrite:
        flow.fix(y, f"{op_name(node)} reads it scaled, others do not")
        x = x.expand(sizes_of(node))
        _rewrite_operand(flow, node, x, small)
        return x
    assert y is not None
    x, y = torch.broadcast_tensors(x, y)
    flow.equate(x, y)
    return torch.maximum(x, y)


def _rewrite_operand(flow: ChannelFlow, node: Node, labels: Tensor, small: Node) -> None:
    """Give a small operand of a sum variables of its own, equal to those of the other operand.

    The fold divides a constant itself, and anything else by a product, which costs little: the
    operand lacks a dimension that the sum has. It keeps apart the many sites of one modulation.
    """
    shape = (1,) * (labels.ndim - len(sizes_of(small))) + sizes_of(small)
    wide = [d for d in range(labels.ndim) if shape[d] == 1 and labels.size(d) > 1]
    narrow = compact(settle(flow.merge(labels, wide).expand(shape)))
    found, inverse = narrow.unique(return_inverse=True)
    base = flow.variables.base(("operand", node), len(found))
    fresh = torch.arange(base, base + len(found))
    mine = torch.where(found > UNIT, fresh, found)[inverse]
    flow.equate(mine, narrow)
    index = node.args.index(small)
    flow.slots.append(Slot(node, "operand", base, len(found), index, mine))


def _add_shifts(flow: ChannelFlow, node: Node, a: Any, b: Any) -> Labels:
    assert flow.scales is not None
    slots = (s for s in flow.scales.slots if s.node is node and s.side == "operand")
    operand = next(slots, None)
    x, y = flow.tensor(a), flow.tensor(b)
    elsewhere = f"{op_name(node)} takes the shift on its other operand"
    if operand is not None:
        flow.fix(x, elsewhere)
        flow.fix(y, elsewhere)
        flow.slots.append(operand)
        labels = operand.labels
    else:
        if x is not None:
            flow.fix(y, elsewhere)
        labels = y if x is None else x
    assert labels is not None
    return labels.expand(sizes_of(node))


def mul(flow: ChannelFlow, node: Node) -> Labels:
    """A product carries the factor of one operand; the other, if it has any, is fixed.

    A constant that nothing scaled is multiplied with can take a factor itself: the weight of a norm
    that is spelled out.
    """
    a, b = args_of(node)[:2]
    x, y = flow.tensor(a), flow.tensor(b)
    if x is None and y is None:
        floats = (n for n in (b, a) if is_constant(n) and _is_float(n))
        constant = next((n for n in floats if _numel(n) > 1), None)
        if constant is None or flow.shifts or movement_of(node) is Movement.DIV:
            return pass_reason(flow, node)
        return _constant_operand(flow, node, constant)
    if (flow.shifts and 1 not in (a, b)) or (movement_of(node) is Movement.DIV and x is None):
        return fix_inputs(flow, node)
    if x is not None and y is not None:
        first = movement_of(node) is Movement.DIV or _numel(a) >= _numel(b)
        flow.fix(y if first else x, f"{op_name(node)} multiplies it with what is scaled")
        y = None if first else y
        x = x if first else None
    labels = y if x is None else x
    assert labels is not None
    if isinstance(a, Node) and isinstance(b, Node):
        flow.traits[node] |= {"product"}
    return labels.expand(sizes_of(node))


def _constant_operand(flow: ChannelFlow, node: Node, constant: Node) -> Labels:
    shape = (1,) * (len(sizes_of(node)) - len(sizes_of(constant))) + sizes_of(constant)
    slot = flow.slot(node, "operand", _numel(constant), node)
    labels = slot.ids.reshape(shape)
    flow.slots[-1] = replace(slot, index=node.args.index(constant), labels=labels)
    return labels.expand(sizes_of(node))


def reduce(flow: ChannelFlow, node: Node) -> Labels:
    """What is summed up is scaled alike; a mean also shifts."""
    labels, dims = flow.tensor(args_of(node)[0]), operand(node, "dim", None)
    if labels is None or not dims or (flow.shifts and movement_of(node) is Movement.SUM):
        return fix_inputs(flow, node)
    return flow.merge(labels, [d % labels.ndim for d in dims]).reshape(sizes_of(node))


def spatial(flow: ChannelFlow, node: Node) -> Labels:
    """Pooling and resizing; averages over zero padding do not shift."""
    labels = flow.tensor(args_of(node)[0])
    averages = is_op(node, torch.ops.aten.avg_pool2d.default)
    pads = averages and (any(operand(node, "padding")) or operand(node, "divisor_override"))
    if labels is None or (flow.shifts and pads):
        return fix_inputs(flow, node)
    dims = range(labels.ndim - SPATIAL_AXES[movement_of(node)], labels.ndim)
    return flow.merge(labels, dims).expand(sizes_of(node))


def attention(flow: ChannelFlow, node: Node) -> Labels:
    """Values pass their factors on, mixed over tokens; query and key have inverse ones."""
    mask, value = operand(node, "attn_mask"), operand(node, "value")
    if operand(node, "dropout_p") != 0:
        return fix_inputs(flow, node)
    if isinstance(mask, Node):
        flow.fix(flow.labels.get(mask), f"{op_name(node)} adds it to the scores")
    heads = sizes_of(node)[-3] if len(sizes_of(node)) > 3 else 1
    q, k, v = (_repeat_heads(flow.tensor(read), heads) for read in args_of(node)[:3])
    if q is not None and k is not None and not flow.shifts:
        flow.equate(flow.merge(q, [q.ndim - 2]), -flow.merge(k, [k.ndim - 2]))
    else:
        for labels in (q, k):
            flow.fix(labels, f"{op_name(node)} compares it with what is not scaled")
    if flow.shifts and isinstance(mask, Node) and _may_hide_a_row(flow, mask):
        flow.why[node] = "the mask of attention may hide all keys of a row"
        flow.fix(v, flow.why[node])
        return None
    if v is None:
        return pass_reason(flow, node)
    flow.traits[node] = flow.traits_of(value) | {"attention"}
    return flow.merge(v, [v.ndim - 2]).expand(sizes_of(node))


def _may_hide_a_row(flow: ChannelFlow, mask: Node) -> bool:
    """Tell whether a query may see no key at all: its result is zero then, whatever the values."""
    value = flow.constants.value(mask)
    if value is None:
        return True
    sees = value if value.dtype is torch.bool else value > -torch.inf
    return not bool(sees.any(-1).all())


def _repeat_heads(labels: Tensor | None, heads: int) -> Tensor | None:
    if labels is None or labels.ndim < 4 or labels.size(-3) == heads:
        return labels
    return settle(labels.repeat_interleave(heads // labels.size(-3), -3))


def pass_reason(flow: ChannelFlow, node: Node) -> Labels:
    """Let views of what is not scaled say why; any other operator is the reason itself."""
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if first in flow.why and movement_of(node) in CARRIES:
        flow.why[node] = flow.why[first]
    else:
        flow.why[node] = f"no factor passes through {op_name(node)}"
    return None


def op_name(node: Node) -> str:
    """Return what messages call an operator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return str(getattr(node.target, "__name__", node.target))


def weight_key(weight: Node) -> TensorKey:
    """Return what identifies a weight: equal for layers that read the same values alike."""
    return TensorKey.of(constant_of(weight))


def _is_float(value: Any) -> bool:
    return isinstance(value, Node) and value.meta["val"].dtype.is_floating_point


def _numel(value: Any) -> int:
    return torch.Size(sizes_of(value)).numel() if isinstance(value, Node) else 0


def _is_free(node: Node) -> bool:
    """Tell whether a value is some rows of one linear, and nobody else reads these."""
    source: Any = node
    while movement_of(source) in CARRIES:
        if len(source.users) != 1 and movement_of(source) is not Movement.SPLIT:
            return False
        source = source.args[0]
        if not isinstance(source, Node):
            return False
    return movement_of(source) is Movement.LINEAR and len(source.users) == 1


# What the first operand alone decides: not SCATTER, which has two.
CARRIES = {*following.MOVES, Movement.COPY, Movement.DROPOUT} - {Movement.SCATTER}
SOURCES = by_movement({
    linear: (Movement.LINEAR,),
    conv: (Movement.CONV,),
    norm: (Movement.LAST_NORM, Movement.CHANNEL_NORM),
    mul: (Movement.MUL, Movement.DIV),
})  # fmt: skip
RULES = following.MOVES | by_movement({
    pass_reason: (Movement.SHAPE_ONLY, Movement.ONES),
    copy: (Movement.COPY, Movement.DROPOUT),
    neg: (Movement.NEG,),
    relu: (Movement.RELU,),
    pad: (Movement.PAD,),
    add: (Movement.ADD, Movement.SUB),
    reduce: (Movement.SUM, Movement.MEAN),  # not the largest of them
    spatial: (Movement.SPATIAL_1D, Movement.SPATIAL_2D, Movement.SPATIAL_3D),
    attention: (Movement.ATTENTION,),  # not a sparse one, which chooses by its values
})  # fmt: skip
