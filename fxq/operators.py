"""The operators fxq knows: how values move through each of them, and its operands by name.

Whoever asks "is this a view", "is this a product" asks here: `TABLE` has every operator once, and
sets of operators are queries on it (`of`). Names, order and defaults of operands are those of the
operator's own schema (`operand`). An operator that is not in the table is nothing anybody relies
on: analyses treat it by its tags, or as unknown.
"""

import functools
import operator
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch.fx import Node

import fxq.ops
import fxq.rectified_attention.op  # noqa: F401  like fxq.ops, registers operators

aten, ops = torch.ops.aten, torch.ops.fxq


class Movement(Enum):
    """How values move from operands to the result; the operators that move them so.

    Operators element by element that carry torch's tag `pointwise` need no entry.
    """

    # Each element of the result is one of an operand's.
    VIEW = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)  # elements in order
    RESHAPE = (  # likewise; canonicalisation makes a constant of it
        aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default,
    )  # fmt: skip
    TRANSPOSE = (  # axes in another order
        aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default,
        aten.mT.default,
    )  # fmt: skip
    ADJOINT = (aten.mH.default, aten.adjoint.default, aten.matrix_H.default)
    EXPAND = (aten.expand.default,)
    REARRANGE = (  # moved, repeated or joined
        aten.movedim.int, aten.select.int, aten.slice.Tensor, aten.narrow.default,
        aten.cat.default, aten.stack.default, aten.repeat.default, aten.repeat_interleave.self_int,
        aten.roll.default, aten.flip.default, aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
    )  # fmt: skip
    SPLIT = (
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    )  # fmt: skip
    SCATTER = (aten.slice_scatter.default, aten.select_scatter.default)  # over a part of the first
    COPY = (  # maybe in other memory or another dtype
        aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.to.device,
        aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.alias.default,
        aten.detach.default, aten.detach_.default,
    )  # fmt: skip
    DROPOUT = (aten.dropout.default, aten.feature_dropout.default)  # a copy, in inference
    PICK = (aten.index.Tensor, aten.index_select.default)  # by an index, which is data
    OVERWRITE = (aten.copy.default,)  # of the second operand
    AS_COMPLEX = (aten.view_as_complex.default,)
    AS_REAL = (aten.view_as_real.default,)
    ITEM = (operator.getitem,)  # one of several results
    PAD = (aten.pad.default, aten.constant_pad_nd.default)
    QUANTIZE = (ops.quantize.default, ops.dequantize.default)  # codes of them, and back
    # Nothing of an operand but its shape, or what it points to.
    SHAPE_ONLY = (
        aten.sym_size.int, aten.zeros_like.default, aten.empty_like.default,
        aten.full_like.default, aten.new_zeros.default, aten.new_empty.default,
        aten.new_full.default,
    )  # fmt: skip
    ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)
    LOOKUP = (aten.embedding.default,)
    QPARAMS = (ops.choose_qparams.default,)
    CHECK = (aten._assert_tensor_metadata.default,)  # of dtypes, as a signature does once per call
    # Element by element.
    ADD = (aten.add.Tensor, aten.add.Scalar)
    SUB = (aten.sub.Tensor, aten.sub.Scalar)
    MUL = (aten.mul.Tensor, aten.mul.Scalar)
    DIV = (aten.div.Tensor, aten.div.Scalar)
    NEG = (aten.neg.default,)
    RELU = (aten.relu.default, aten.leaky_relu.default)  # a positive factor may come out of them
    ACTIVATION = (aten.gelu.default, aten.silu.default)
    AND = (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)
    NOT = (aten.logical_not.default, aten.bitwise_not.default)
    WHERE = (aten.where.self, aten.where.ScalarOther)
    MASKED_FILL = (aten.masked_fill.Scalar,)
    # Over axes.
    MEAN = (aten.mean.dim,)
    SUM = (aten.sum.dim_IntList, aten.sum.default)
    REDUCE = (aten.amax.default, aten.amin.default, aten.var.correction)
    SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
    LAST_NORM = (aten.layer_norm.default, aten.rms_norm.default)  # over the last axes
    CHANNEL_NORM = (aten.group_norm.default, aten.batch_norm.default)  # channels are axis 1
    # Over windows of the last axes, each channel by itself.
    SPATIAL_1D = (aten.adaptive_avg_pool1d.default, aten.upsample_nearest1d.vec)
    SPATIAL_2D = (
        aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default,
        aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    )  # fmt: skip
    SPATIAL_3D = (aten.adaptive_avg_pool3d.default, aten.upsample_nearest3d.vec)
    # Sums of products.
    LINEAR = (aten.linear.default,)
    CONV = (
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    )  # fmt: skip
    CONV_TRANSPOSE = (
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    )  # fmt: skip
    MATMUL = (
        aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default,
    )  # fmt: skip
    ADDMM = (aten.addmm.default, aten.baddbmm.default)  # added to the first operand
    EINSUM = (aten.einsum.default,)
    ATTENTION = (aten.scaled_dot_product_attention.default,)
    SPARSE_ATTENTION = (ops.rectified_attention.default,)


TABLE: Mapping[Any, Movement] = {target: each for each in Movement for target in each.value}


def movement_of(node: Node) -> Movement | None:
    """Return how values move through a node, None where the table does not have its operator."""
    return TABLE.get(node.target) if node.op == "call_function" else None


def of(*movements: Movement) -> frozenset[Any]:
    """Return the operators of these movements."""
    return frozenset(target for movement in movements for target in movement.value)


VIEWS = of(Movement.VIEW, Movement.TRANSPOSE)  # what a weight may go through before it is used
RESHAPES = of(Movement.VIEW, Movement.RESHAPE)
MOVED = (Movement.REARRANGE, Movement.SPLIT)  # parts of tensors, in other places
COPIES = of(Movement.COPY, Movement.DROPOUT)
ADD, MUL, DIV = of(Movement.ADD), of(Movement.MUL), of(Movement.DIV)
SOFTMAX = of(Movement.SOFTMAX)
NORMS = of(Movement.LAST_NORM, Movement.CHANNEL_NORM)
LINEAR, CONV = of(Movement.LINEAR), of(Movement.CONV)
LAYERS = LINEAR | CONV
MATMUL, ADDMM = of(Movement.MATMUL), of(Movement.ADDMM)
DENSE_ATTENTION = of(Movement.ATTENTION)
SPARSE_ATTENTION = ops.rectified_attention.default
ATTENTION = DENSE_ATTENTION | {SPARSE_ATTENTION}
SPATIAL_AXES: Mapping[Movement | None, int] = {
    Movement.SPATIAL_1D: 1, Movement.SPATIAL_2D: 2, Movement.SPATIAL_3D: 3,
}  # fmt: skip
# What canonicalisation always puts in the place of an operator.
CANONICAL: Mapping[Any, str] = {
    aten.view.default: "reshape", aten._unsafe_view.default: "reshape",
    aten.numpy_T.default: "permute", aten.mT.default: "transpose",
    **dict.fromkeys(Movement.ADJOINT.value, "transpose"),  # but of complex numbers
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten.detach_.default), "its input"),
    **dict.fromkeys(Movement.CHECK.value, "nothing"),
}  # fmt: skip

_ABSENT = object()


@functools.cache
def _operands(target: torch._ops.OpOverload) -> dict[str, tuple[int, Any]]:
    """Return each operand's position and default by name."""
    return {
        argument.name: (
            index, argument.default_value if argument.has_default_value() else _ABSENT,
        )
        for index, argument in enumerate(target._schema.arguments)
    }  # fmt: skip


def canonical_form(node: Node) -> str | None:
    """Return what canonicalisation always puts in the place of a node, None where it is canonical
    or may stay."""
    if movement_of(node) is Movement.ADJOINT and node.meta["val"].is_complex():
        return None
    return CANONICAL.get(node.target)


def operand(node: Node, name: str, default: Any = _ABSENT) -> Any:
    """Return an operand by name: given by position, by keyword, or left to its default.

    Args:
        node: a call of an operator.
        name: in the operator's schema.
        default: for an operator that has no such operand.
    """
    index, left_out = _operands(node.target).get(name, (len(node.args), default))
    found = node.args[index] if index < len(node.args) else node.kwargs.get(name, left_out)
    if found is _ABSENT:
        raise KeyError(f"expected an operand {name!r} of {node.target}, found {node.format_node()}")
    return found


def set_operand(node: Node, name: str, value: Any) -> None:
    """Give an operand another value; those in front of it that were left out get their defaults."""
    names = list(_operands(node.target))
    end = max(names.index(name) + 1, len(node.args))
    values = {key: operand(node, key) for key in names[:end]} | {name: value}
    node.args = tuple(values.values())
    node.kwargs = {key: kept for key, kept in node.kwargs.items() if key not in values}


def multiplied(node: Node) -> tuple[Any, Any]:
    """Return the two operands that a matrix product multiplies."""
    start = 1 if node.target in ADDMM else 0
    return node.args[start], node.args[start + 1]
