"""Key padding: from a mask in the graph to the number of valid text tokens.

Sparse attention knows one kind of mask: some text tokens at the end of the text are padding. A mask
`[B, 1, 1, S]` says so if it keeps every visual token and a prefix of the text. That is proved for
text behind the visual tokens and

    arange(S) < n        with n = (sum of a mask) + at least the number of visual tokens

in its various spellings; for anything else it takes the user's word. A mask that is an input may be
any dtype, as pipelines pass zeros and ones as floats. The count is a sum in the graph, so nothing
waits for the device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.constants import constant_value
from fxq.graph import args_of, dtype_of, insert_call, is_op, shape_of
from fxq.layer import Skip
from fxq.passes.common.scaling.rules import COPIES
from fxq.passes.rectified_spaattn.layout import Segments

aten = torch.ops.aten
# What changes neither the elements of a mask nor their order.
SAME = COPIES | {
    aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.expand.default,
    aten.squeeze.dim,
}  # fmt: skip
ADD = (aten.add.Tensor, aten.add.Scalar)
NOT = (aten.logical_not.default, aten.bitwise_not.default)
# Comparison -> which operand counts up.
KEEPS = {aten.lt.Tensor: 0, aten.gt.Tensor: 1}
HIDES = {aten.ge.Tensor: 0, aten.le.Tensor: 1}
SUM = (aten.sum.dim_IntList, aten.sum.default)
ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)


def valid_text(
    mask: Node | None, segments: Segments, word: bool, before: Node
) -> Node | Skip | None:
    """Insert the number of valid text tokens of each sample `[B]`, int32, or say why not.

    Args:
        mask: attention's mask.
        segments: of its sequence.
        word: the user vouches for every mask (`TokenLayout.prefix_masks`).
        before: the attention, in front of which to insert.
    Returns:
        None where nothing is masked.
    """
    if mask is None or _hides_nothing(mask):
        return None
    shape = shape_of(mask)
    batch = shape_of(args_of(before)[0])[0]
    is_bool = dtype_of(mask) == torch.bool
    if not is_bool or len(shape) != 4 or shape != (batch, 1, 1, segments.size):
        return Skip(
            f"its mask is not key padding: expected bool [{batch}, 1, 1, {segments.size}], found "
            f"{dtype_of(mask)} {list(shape)}"
            + ("; TokenLayout(prefix_masks=True) is about the former only" if word else ""),
            intended=False,
        )
    if not segments.text_size:
        return Skip("its mask hides visual tokens: there is no text to be padded", intended=False)
    if not word and not _is_prefix(mask, segments):
        return Skip(
            "its mask [B, 1, 1, S] cannot be proved to keep all visual tokens and a prefix of the "
            "text; if it does, say so with TokenLayout(prefix_masks=True)",
            intended=False,
        )
    flat = insert_call(aten.select.int, (mask, 1, 0), before=before)
    flat = insert_call(aten.select.int, (flat, 1, 0), before=before)  # [B, S]
    start = segments.text_start
    text = insert_call(
        aten.slice.Tensor, (flat, 1, start, start + segments.text_size), before=before
    )
    return insert_call(aten.sum.dim_IntList, (text, [1]), {"dtype": torch.int32}, before=before)


def _is_prefix(mask: Node, segments: Segments) -> bool:
    """Tell whether a mask provably keeps all visual tokens and a prefix of the text."""
    if segments.text_start == 0:
        return False  # a prefix of the whole sequence would hide visual tokens
    length = _length(origin(mask), segments.size)
    return length is not None and _at_least(length) >= segments.n_visual


def _length(mask: Any, size: int) -> Node | None:
    """Return n of a mask that is provably `arange(size) < n`; None where it is not."""
    if is_op(mask, *NOT) and dtype_of(args_of(mask)[0]) == torch.bool:
        return _compared(origin(args_of(mask)[0]), size, HIDES)
    if is_op(mask, aten.masked_fill.Scalar):
        kept, hidden, value = args_of(mask)
        return _compared(origin(hidden), size, HIDES) if not value and _all_true(kept) else None
    return _compared(mask, size, KEEPS)


def _compared(node: Any, size: int, comparisons: dict[Any, int]) -> Node | None:
    """Return n where `node` compares `arange(size)` along the last dimension with n `[..., 1]`."""
    if not isinstance(node, Node) or node.target not in comparisons:
        return None
    place = comparisons[node.target]
    counter, length = args_of(node)[place], args_of(node)[1 - place]
    value = constant_value(counter) if isinstance(counter, Node) else None
    if value is None or value.numel() != size or value.shape[-1] != size:
        return None
    if not torch.equal(value.flatten().cpu(), torch.arange(size)):
        return None
    return length if isinstance(length, Node) and shape_of(length)[-1:] == (1,) else None


def _at_least(length: Any) -> int:
    """Return a bound below a number of tokens that is computed in the graph."""
    length = origin(length)
    if is_op(length, *ADD) and not length.kwargs:
        a, b = args_of(length)
        return _at_least(a) + _at_least(b)
    if isinstance(length, int):
        return length
    value = constant_value(length) if isinstance(length, Node) else None
    if value is not None:
        return int(value.min())
    # A sum of booleans is not negative, nor is that of a mask among the inputs, of zeros and ones;
    # anything else may be.
    summed = args_of(length)[0] if is_op(length, *SUM) else None
    counts = summed is not None and dtype_of(summed) == torch.bool
    given = isinstance(source := origin(summed), Node) and source.op == "placeholder"
    return 0 if counts or given else -(2**62)


def _hides_nothing(mask: Node) -> bool:
    """Tell whether a mask is constant and of no effect: all true, or a bias of zeros."""
    if dtype_of(mask) == torch.bool:
        return _all_true(mask)
    value: Tensor | None = constant_value(origin(mask))
    return value is not None and not bool(value.any())


def _all_true(node: Any) -> bool:
    node = origin(node)
    if is_op(node, *ONES) or (is_op(node, aten.full.default) and args_of(node)[1] is True):
        return True
    value: Tensor | None = constant_value(node)
    return value is not None and bool(value.all())


def origin(node: Any) -> Any:
    """Return what a mask or count is a view or copy of."""
    while is_op(node, *SAME):
        node = args_of(node)[0]
    return node
