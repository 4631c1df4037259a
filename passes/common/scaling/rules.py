"""What each operator does to the labels of its operands; see `flow.py`.

An operator without a rule here fixes what it reads at one. A wrong rule would change the float
function; a missing one only costs a site. `flow.shifts` tells whether labels stand for shifts.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq.account import ATTENTION, CONV, LINEAR
from fxq.constants import constant_value
from fxq.graph import constant_of, hint, is_constant, is_op
from fxq.identity import TensorKey
from fxq.passes.common.scaling.flow import ChannelFlow, Slot
from fxq.passes.common.scaling.labels import UNIT, ZERO, compact, settle, sizes_of

aten = torch.ops.aten
Rule = Callable[[ChannelFlow, Node], None]

RESHAPES = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default,
})  # fmt: skip
SPLITS = frozenset({
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
})  # fmt: skip
REARRANGES = SPLITS | {
    aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.select.int,
    aten.slice.Tensor, aten.narrow.default, aten.cat.default, aten.stack.default,
    aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.roll.default,
    aten.flip.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
}  # fmt: skip
COPIES = frozenset({
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default,
    aten.type_as.default, aten.dropout.default,
})  # fmt: skip
RELU = frozenset({aten.relu.default, aten.leaky_relu.default})
PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
SHAPE_ONLY = frozenset({
    aten.sym_size.int, aten.ones_like.default, aten.zeros_like.default, aten.empty_like.default,
    aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default,
    aten.new_full.default,
})  # fmt: skip
REDUCTIONS = frozenset({aten.mean.dim, aten.sum.dim_IntList})
DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})
PRODUCTS = DIVISIONS | {aten.mul.Tensor, aten.mul.Scalar}
# Operator -> how many of the last dimensions it works over, each channel by itself.
SPATIAL: dict[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1, aten.upsample_nearest1d.vec: 1,
    aten.avg_pool2d.default: 2, aten.max_pool2d.default: 2, aten.adaptive_avg_pool2d.default: 2,
    aten.upsample_nearest2d.vec: 2, aten.upsample_bilinear2d.vec: 2,
    aten.adaptive_avg_pool3d.default: 3, aten.upsample_nearest3d.vec: 3,
}  # fmt: skip
LAST_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
NORMS = LAST_NORMS | {aten.group_norm.default, aten.batch_norm.default}


def fix_inputs(flow: ChannelFlow, node: Node) -> None:
    """The rule of operators without one."""
    for read in node.all_input_nodes:
        flow.fix(flow.labels.get(read), f"{op_name(node)} also reads it")
    flow.why[node] = f"no factor passes through {op_name(node)}"


def linear(flow: ChannelFlow, node: Node) -> None:
    """A weight `[N, K]` has K input variables and N output variables."""
    x, weight, *rest = _args(node)
    constants = (weight, *(bias for bias in rest if bias is not None))
    if not all(map(is_constant, constants)):
        fix_inputs(flow, node)
        return
    n, k = sizes_of(weight)
    flow.consume(flow.slot(node, "in", k, weight_key(weight)), x, -1)
    out = flow.slot(node, "out", n, weight_key(weight))
    flow.traits[node] = frozenset()
    flow.set(node, out.ids.expand(sizes_of(node)))


def conv(flow: ChannelFlow, node: Node) -> None:
    """A weight `[N, C / groups, ...]` has C input variables and N output variables."""
    x, weight, *rest = _args(node)
    constants = (weight, *(bias for bias in rest[:1] if bias is not None))
    transposed = is_op(node, aten.convolution.default) and rest[4]
    if transposed or not all(map(is_constant, constants)):
        fix_inputs(flow, node)
        return
    spatial = len(sizes_of(weight)) - 2
    dim = len(sizes_of(x)) - spatial - 1
    columns = flow.slot(node, "in", sizes_of(x)[dim], weight_key(weight))
    flow.consume(columns, x, dim)
    padding: Any = rest[2] if len(rest) > 2 else (0,)
    if flow.shifts and padding != "valid" and (padding == "same" or any(padding)):
        flow.fix(columns.ids, f"the zero padding of {op_name(node)} does not shift")
    out = flow.slot(node, "out", sizes_of(weight)[0], weight_key(weight))
    flow.traits[node] = frozenset()
    flow.set(node, out.ids.reshape(-1, *[1] * spatial).expand(sizes_of(node)))


def norm(flow: ChannelFlow, node: Node) -> None:
    """A norm has output variables only: it undoes what is done to its input."""
    fix_inputs(flow, node)
    shape, last = sizes_of(node), node.target in LAST_NORMS
    affine = [arg for arg in node.args[1:] if isinstance(arg, Node)]
    if (last and len(_args(node)[1]) != 1) or not all(map(is_constant, affine)):
        return
    out = flow.slot(node, "out", shape[-1] if last else shape[1], node)
    labels = out.ids if last else out.ids.reshape(-1, *[1] * (len(shape) - 2))
    flow.traits[node] = frozenset()
    flow.set(node, labels.expand(shape))


def shape_only(flow: ChannelFlow, node: Node) -> None:
    pass_reason(flow, node)


def reshape(flow: ChannelFlow, node: Node) -> None:
    flow.set(node, flow.labels[_args(node)[0]].reshape(sizes_of(node)))


def rearrange(flow: ChannelFlow, node: Node) -> None:
    """Run the operator on the labels. An operand that is not scaled is UNIT all over."""

    def value(read: Node) -> Any:
        if (labels := flow.tensor(read)) is not None:
            return labels
        val = read.meta["val"]
        if isinstance(val, Tensor):
            return torch.full((1,) * val.ndim, UNIT).expand(sizes_of(read))
        return hint(val) if isinstance(val, int | torch.SymInt) else val

    flow.why[node] = next((flow.why[n] for n in node.all_input_nodes if n in flow.why), "")
    args, kwargs = map_arg((node.args, node.kwargs), value)
    result: Any = node.target(*args, **kwargs)  # type: ignore[operator]
    flow.set(node, list(result) if isinstance(result, list | tuple) else result)


def getitem(flow: ChannelFlow, node: Node) -> None:
    source, index = _args(node)
    flow.set(node, flow.labels[source][index])


def copy(flow: ChannelFlow, node: Node) -> None:
    labels = flow.tensor(_args(node)[0])
    if labels is None or not node.meta["val"].dtype.is_floating_point:
        fix_inputs(flow, node)
    else:
        flow.set(node, labels)


def neg(flow: ChannelFlow, node: Node) -> None:
    (fix_inputs if flow.shifts else copy)(flow, node)


def relu(flow: ChannelFlow, node: Node) -> None:
    """A positive factor passes through, a shift does not."""
    flow.traits[node] |= {"relu"}
    (fix_inputs if flow.shifts else copy)(flow, node)


def pad(flow: ChannelFlow, node: Node) -> None:
    """Zeros can be scaled, and do not shift."""
    x, amounts, *mode = _args(node)
    if not any(amounts):
        flow.set(node, flow.labels[x])
    elif flow.shifts or any(v not in ("constant", None, 0) for v in (*mode, *node.kwargs.values())):
        fix_inputs(flow, node)
    else:
        flow.set(node, torch.constant_pad_nd(flow.labels[x], amounts, ZERO))


def add(flow: ChannelFlow, node: Node) -> None:
    """Both operands of a sum are scaled alike; one of them takes the shift."""
    a, b = _args(node)[:2]
    if node.kwargs.get("alpha", 1) != 1 or (flow.shifts and is_op(node, aten.sub.Tensor)):
        fix_inputs(flow, node)
    elif flow.shifts:
        _add_shifts(flow, node, a, b)
    else:
        _add_scales(flow, node, *((a, b) if _numel(a) >= _numel(b) else (b, a)))


def _add_scales(flow: ChannelFlow, node: Node, big: Any, small: Any) -> None:
    x, y = flow.tensor(big), flow.tensor(small)
    rewrite = _is_float(small) and (
        is_constant(small) or (_numel(small) < _numel(big) and not _is_free(small))
    )
    if x is None or not isinstance(small, Node) or (y is None and not rewrite):
        fix_inputs(flow, node)
    elif rewrite:
        flow.fix(y, f"{op_name(node)} reads it scaled, others do not")
        x = x.expand(sizes_of(node))
        _rewrite_operand(flow, node, x, small)
        flow.set(node, x)
    else:
        assert y is not None
        x, y = torch.broadcast_tensors(x, y)
        flow.equate(x, y)
        flow.set(node, torch.maximum(x, y))


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


def _add_shifts(flow: ChannelFlow, node: Node, a: Any, b: Any) -> None:
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
    flow.set(node, labels.expand(sizes_of(node)))


def mul(flow: ChannelFlow, node: Node) -> None:
    """A product carries the factor of one operand; the other, if it has any, is fixed.

    A constant that nothing scaled is multiplied with can take a factor itself: the weight of a norm
    that is spelled out.
    """
    a, b = _args(node)[:2]
    x, y = flow.tensor(a), flow.tensor(b)
    if x is None and y is None:
        floats = (n for n in (b, a) if is_constant(n) and _is_float(n))
        constant = next((n for n in floats if _numel(n) > 1), None)
        if constant is None or flow.shifts or node.target in DIVISIONS:
            pass_reason(flow, node)
        else:
            _constant_operand(flow, node, constant)
        return
    if (flow.shifts and 1 not in (a, b)) or (node.target in DIVISIONS and x is None):
        fix_inputs(flow, node)
        return
    if x is not None and y is not None:
        first = node.target in DIVISIONS or _numel(a) >= _numel(b)
        flow.fix(y if first else x, f"{op_name(node)} multiplies it with what is scaled")
        y = None if first else y
        x = x if first else None
    labels = y if x is None else x
    assert labels is not None
    if isinstance(a, Node) and isinstance(b, Node):
        flow.traits[node] |= {"product"}
    flow.set(node, labels.expand(sizes_of(node)))


def _constant_operand(flow: ChannelFlow, node: Node, constant: Node) -> None:
    shape = (1,) * (len(sizes_of(node)) - len(sizes_of(constant))) + sizes_of(constant)
    slot = flow.slot(node, "operand", _numel(constant), node)
    labels = slot.ids.reshape(shape)
    flow.slots[-1] = replace(slot, index=node.args.index(constant), labels=labels)
    flow.set(node, labels.expand(sizes_of(node)))


def reduce(flow: ChannelFlow, node: Node) -> None:
    """What is summed up is scaled alike; a mean also shifts."""
    x, dims = _args(node)[:2]
    labels = flow.tensor(x)
    if labels is None or not dims or (flow.shifts and is_op(node, aten.sum.dim_IntList)):
        fix_inputs(flow, node)
    else:
        merged = flow.merge(labels, [d % labels.ndim for d in dims])
        flow.set(node, merged.reshape(sizes_of(node)))


def spatial(flow: ChannelFlow, node: Node) -> None:
    """Pooling and resizing; averages over zero padding do not shift."""
    x, *rest = _args(node)
    labels = flow.tensor(x)
    average = is_op(node, aten.avg_pool2d.default)
    padded = average and len(rest) > 2 and any(rest[2])
    divided = average and len(rest) > 5 and rest[5] is not None
    if labels is None or (flow.shifts and (padded or divided)):
        fix_inputs(flow, node)
    else:
        dims = range(labels.ndim - SPATIAL[node.target], labels.ndim)
        flow.set(node, flow.merge(labels, dims).expand(sizes_of(node)))


def attention(flow: ChannelFlow, node: Node) -> None:
    """Values pass their factors on, mixed over tokens; query and key have inverse ones."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if (node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0)) != 0:
        fix_inputs(flow, node)
        return
    if isinstance(mask, Node):
        flow.fix(flow.labels.get(mask), f"{op_name(node)} adds it to the scores")
    heads = sizes_of(node)[-3] if len(sizes_of(node)) > 3 else 1
    q, k, v = (_repeat_heads(flow.tensor(read), heads) for read in _args(node)[:3])
    if q is not None and k is not None and not flow.shifts:
        flow.equate(flow.merge(q, [q.ndim - 2]), -flow.merge(k, [k.ndim - 2]))
    else:
        for labels in (q, k):
            flow.fix(labels, f"{op_name(node)} compares it with what is not scaled")
    if flow.shifts and isinstance(mask, Node) and _may_hide_a_row(mask):
        flow.why[node] = "the mask of attention may hide all keys of a row"
        flow.fix(v, flow.why[node])
        return
    if v is None:
        pass_reason(flow, node)
        return
    flow.traits[node] = flow.traits_of(node.args[2]) | {"attention"}
    flow.set(node, flow.merge(v, [v.ndim - 2]).expand(sizes_of(node)))


def _may_hide_a_row(mask: Node) -> bool:
    """Tell whether a query may see no key at all: its result is zero then, whatever the values."""
    value = constant_value(mask)
    if value is None:
        return True
    sees = value if value.dtype is torch.bool else value > -torch.inf
    return not bool(sees.any(-1).all())


def _repeat_heads(labels: Tensor | None, heads: int) -> Tensor | None:
    if labels is None or labels.ndim < 4 or labels.size(-3) == heads:
        return labels
    return settle(labels.repeat_interleave(heads // labels.size(-3), -3))


def pass_reason(flow: ChannelFlow, node: Node) -> None:
    """Let views of what is not scaled say why; any other operator is the reason itself."""
    first = node.all_input_nodes[0] if node.all_input_nodes else None
    if first in flow.why and (node.target in CARRIES or is_op(node, operator.getitem)):
        flow.why[node] = flow.why[first]
    else:
        flow.why[node] = f"no factor passes through {op_name(node)}"


def op_name(node: Node) -> str:
    """Return what messages call an operator."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return str(getattr(node.target, "__name__", node.target))


def weight_key(weight: Node) -> TensorKey:
    """Return what identifies a weight: equal for layers that read the same values alike."""
    return TensorKey.of(constant_of(weight))


def _args(node: Node) -> Any:
    return node.args


def _is_float(value: Any) -> bool:
    return isinstance(value, Node) and value.meta["val"].dtype.is_floating_point


def _numel(value: Any) -> int:
    return torch.Size(sizes_of(value)).numel() if isinstance(value, Node) else 0


def _is_free(node: Node) -> bool:
    """Tell whether a value is some rows of one linear, and nobody else reads these."""
    source: Any = node
    while source.target in CARRIES or is_op(source, operator.getitem):
        if len(source.users) != 1 and source.target not in SPLITS:
            return False
        source = source.args[0]
        if not isinstance(source, Node):
            return False
    return source.target in LINEAR and len(source.users) == 1


LAYERS = LINEAR | CONV
CARRIES = RESHAPES | REARRANGES | COPIES
SOURCES: dict[Any, Rule] = {
    **dict.fromkeys(LINEAR, linear),
    **dict.fromkeys(CONV, conv),
    **dict.fromkeys(NORMS, norm),
    **dict.fromkeys(PRODUCTS, mul),
}
RULES: dict[Any, Rule] = {
    operator.getitem: getitem,
    **dict.fromkeys(SHAPE_ONLY, shape_only),
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(REARRANGES, rearrange),
    **dict.fromkeys(COPIES, copy),
    aten.neg.default: neg,
    **dict.fromkeys(RELU, relu),
    **dict.fromkeys(PADS, pad),
    aten.add.Tensor: add,
    aten.sub.Tensor: add,
    **dict.fromkeys(REDUCTIONS, reduce),
    **dict.fromkeys(SPATIAL, spatial),
    **dict.fromkeys(ATTENTION, attention),
}
