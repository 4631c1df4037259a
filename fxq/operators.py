"""The operators fxq knows: how values move through each of them, and its operands by name.

Whoever asks "is this a view", "is this a product" asks here: `TABLE` has every operator once, and
sets of operators are queries on it (`of`). Names, order and defaults of operands are those of the
operator's own schema (`operand`). An operator that is not in the table is nothing anybody relies
on: analyses treat it by its tags, or as unknown.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch.fx import Node

import fxq.ops
import fxq.rectified_attention.op  # noqa: F401  like fxq.ops, registers operators

aten, ops = torch.ops.aten, torch.ops.fxq


class Movement(Enum):
    """How values move from an operator's operands to its result."""

    # Each element of the result is one of an operand's.
    VIEW = auto()  # other sizes, elements in the same order; a weight may be seen through it
    RESHAPE = auto()  # likewise; of constants, canonicalisation makes a constant
    TRANSPOSE = auto()  # axes in another order; a weight may be seen through it
    ADJOINT = auto()  # likewise, and conjugated where complex
    EXPAND = auto()  # repeated along an axis of size 1
    REARRANGE = auto()  # moved, repeated or joined
    SPLIT = auto()  # into several results
    SCATTER = auto()  # one operand written over a part of another
    COPY = auto()  # the same, maybe in other memory, or in another dtype
    DROPOUT = auto()  # the same, in inference
    PAD = auto()
    QUANTIZE = auto()  # the same, rounded, or codes for it
    # Nothing of an operand but its shape, or what it points to.
    SHAPE_ONLY = auto()
    ONES = auto()
    LOOKUP = auto()
    QPARAMS = auto()
    CHECK = auto()  # no result
    # Element by element. Operators of torch that carry its tag `pointwise` need no entry.
    ADD = auto()
    SUB = auto()
    MUL = auto()
    DIV = auto()
    NEG = auto()
    RELU = auto()  # commutes with a positive factor
    ACTIVATION = auto()
    AND = auto()
    NOT = auto()
    WHERE = auto()
    MASKED_FILL = auto()
    # Sums over axes.
    MEAN = auto()
    SUM = auto()
    REDUCE = auto()  # to anything else than a sum or mean
    SOFTMAX = auto()
    LAST_NORM = auto()  # over the last axes
    CHANNEL_NORM = auto()  # axis 1 has the channels
    SPATIAL = auto()  # over windows of the last axes, each channel by itself
    # Sums of products.
    LINEAR = auto()
    CONV = auto()
    CONV_TRANSPOSE = auto()
    MATMUL = auto()
    ADDMM = auto()  # a product added to the first operand
    EINSUM = auto()
    ATTENTION = auto()
    SPARSE_ATTENTION = auto()


@dataclass(frozen=True)
class Operator:
    """What is known of an operator beyond its schema.

    Args:
        movement: how values move through it.
        kind: what the account calls it, where it multiplies.
        spatial: how many of the last axes it works over.
        canonical: what canonicalisation always puts in its place, None where it is canonical.
    """

    movement: Movement
    kind: str | None = None
    spatial: int = 0
    canonical: str | None = None


ROWS: tuple[tuple[Operator, tuple[Any, ...]], ...] = (
    (Operator(Movement.VIEW), (aten.reshape.default,)),
    (Operator(Movement.VIEW, canonical="reshape"), (aten.view.default, aten._unsafe_view.default)),
    (Operator(Movement.RESHAPE), (
        aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.unsqueeze.default,
    )),
    (Operator(Movement.TRANSPOSE), (
        aten.t.default, aten.permute.default, aten.transpose.int,
    )),
    (Operator(Movement.TRANSPOSE, canonical="permute"), (aten.numpy_T.default,)),
    (Operator(Movement.TRANSPOSE, canonical="transpose"), (aten.mT.default,)),
    (Operator(Movement.ADJOINT, canonical="transpose"), (
        aten.mH.default, aten.adjoint.default, aten.matrix_H.default,
    )),
    (Operator(Movement.EXPAND), (aten.expand.default,)),
    (Operator(Movement.REARRANGE), (
        aten.movedim.int, aten.select.int, aten.slice.Tensor, aten.narrow.default,
        aten.cat.default, aten.stack.default, aten.repeat.default, aten.repeat_interleave.self_int,
        aten.roll.default, aten.flip.default, aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
    )),
    (Operator(Movement.SPLIT), (
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int,
    )),
    (Operator(Movement.SCATTER), (aten.slice_scatter.default, aten.select_scatter.default)),
    (Operator(Movement.COPY), (
        aten.contiguous.default, aten.clone.default, aten.to.dtype, aten.to.device,
        aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default,
    )),
    (Operator(Movement.COPY, canonical="its input"), (
        aten.alias.default, aten.detach.default, aten.detach_.default,
    )),
    (Operator(Movement.DROPOUT), (aten.dropout.default, aten.feature_dropout.default)),
    (Operator(Movement.PAD), (aten.pad.default, aten.constant_pad_nd.default)),
    (Operator(Movement.QUANTIZE), (ops.quantize.default, ops.dequantize.default)),
    (Operator(Movement.SHAPE_ONLY), (
        aten.sym_size.int, aten.zeros_like.default, aten.empty_like.default,
        aten.full_like.default, aten.new_zeros.default, aten.new_empty.default,
        aten.new_full.default,
    )),
    (Operator(Movement.ONES), (
        aten.ones.default, aten.ones_like.default, aten.new_ones.default,
    )),
    (Operator(Movement.LOOKUP), (aten.embedding.default,)),
    (Operator(Movement.QPARAMS), (ops.choose_qparams.default,)),
    # Of dtypes that a program's signature checks once per call.
    (Operator(Movement.CHECK, canonical="nothing"), (aten._assert_tensor_metadata.default,)),
    (Operator(Movement.ADD), (aten.add.Tensor, aten.add.Scalar)),
    (Operator(Movement.SUB), (aten.sub.Tensor, aten.sub.Scalar)),
    (Operator(Movement.MUL), (aten.mul.Tensor, aten.mul.Scalar)),
    (Operator(Movement.DIV), (aten.div.Tensor, aten.div.Scalar)),
    (Operator(Movement.NEG), (aten.neg.default,)),
    (Operator(Movement.RELU), (aten.relu.default, aten.leaky_relu.default)),
    (Operator(Movement.ACTIVATION), (aten.gelu.default, aten.silu.default)),
    (Operator(Movement.AND), (
        aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor,
    )),
    (Operator(Movement.NOT), (aten.logical_not.default, aten.bitwise_not.default)),
    (Operator(Movement.WHERE), (aten.where.self, aten.where.ScalarOther)),
    (Operator(Movement.MASKED_FILL), (aten.masked_fill.Scalar,)),
    (Operator(Movement.MEAN), (aten.mean.dim,)),
    (Operator(Movement.SUM), (aten.sum.dim_IntList, aten.sum.default)),
    (Operator(Movement.REDUCE), (aten.amax.default, aten.amin.default, aten.var.correction)),
    (Operator(Movement.SOFTMAX), (
        aten.softmax.int, aten._softmax.default, aten._safe_softmax.default,
    )),
    (Operator(Movement.LAST_NORM), (aten.layer_norm.default, aten.rms_norm.default)),
    (Operator(Movement.CHANNEL_NORM), (aten.group_norm.default, aten.batch_norm.default)),
    (Operator(Movement.SPATIAL, spatial=1), (
        aten.adaptive_avg_pool1d.default, aten.upsample_nearest1d.vec,
    )),
    (Operator(Movement.SPATIAL, spatial=2), (
        aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default,
        aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
    )),
    (Operator(Movement.SPATIAL, spatial=3), (
        aten.adaptive_avg_pool3d.default, aten.upsample_nearest3d.vec,
    )),
    (Operator(Movement.LINEAR, "linear"), (aten.linear.default,)),
    (Operator(Movement.CONV, "conv"), (
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    )),
    (Operator(Movement.CONV_TRANSPOSE, "transposed conv"), (
        aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    )),
    (Operator(Movement.MATMUL, "matmul"), (
        aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default,
    )),
    (Operator(Movement.ADDMM, "matmul"), (aten.addmm.default, aten.baddbmm.default)),
    (Operator(Movement.EINSUM, "einsum"), (aten.einsum.default,)),
    (Operator(Movement.ATTENTION, "attention"), (aten.scaled_dot_product_attention.default,)),
    (Operator(Movement.SPARSE_ATTENTION, "attention"), (ops.rectified_attention.default,)),
)  # fmt: skip
TABLE: Mapping[Any, Operator] = {
    target: operator for operator, targets in ROWS for target in targets
}


def of(*movements: Movement) -> frozenset[Any]:
    """Return the operators of these movements."""
    return frozenset(target for target, row in TABLE.items() if row.movement in movements)


VIEWS = of(Movement.VIEW, Movement.TRANSPOSE)  # what a weight may go through before it is used
RESHAPES = of(Movement.VIEW, Movement.RESHAPE)
SPLITS = of(Movement.SPLIT)
REARRANGES = SPLITS | of(
    Movement.TRANSPOSE, Movement.EXPAND, Movement.REARRANGE, Movement.SCATTER
)  # fmt: skip
COPIES = of(Movement.COPY, Movement.DROPOUT)
SHAPE_ONLY = of(Movement.SHAPE_ONLY, Movement.ONES)
ADD, MUL, DIV = of(Movement.ADD), of(Movement.MUL), of(Movement.DIV)
SOFTMAX = of(Movement.SOFTMAX)
LAST_NORMS = of(Movement.LAST_NORM)
NORMS = LAST_NORMS | of(Movement.CHANNEL_NORM)
LINEAR, CONV = of(Movement.LINEAR), of(Movement.CONV)
LAYERS = LINEAR | CONV
MATMUL, ADDMM = of(Movement.MATMUL), of(Movement.ADDMM)
DENSE_ATTENTION = of(Movement.ATTENTION)
SPARSE_ATTENTION = ops.rectified_attention.default
ATTENTION = DENSE_ATTENTION | {SPARSE_ATTENTION}

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
    row = TABLE.get(node.target)
    if row is None or (row.movement is Movement.ADJOINT and node.meta["val"].is_complex()):
        return None
    return row.canonical


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
