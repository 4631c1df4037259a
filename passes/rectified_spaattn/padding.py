"""Key padding: from a mask in the graph to the number of valid text tokens.

Sparse attention knows one kind of mask: some text tokens at the end of the text are padding. A mask
`[B, 1, 1, S]`, or `[B, 1, S, S]` made of one for keys and one for queries, hides nothing else if it
provably shows all visual tokens (`fxq.analysis.shown`). Where it provably shows a prefix of the
text (`fxq.analysis.masks`) the text stays as it is; elsewhere keys and values of the text are put
in order first, the valid ones in front, which softmax does not see. The word of the user
(`TokenLayout.prefix_masks`) stands for both proofs. Count and order are computed in the graph, so
nothing waits for the device.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from fxq.analysis.masks import Masks, keys_and_queries
from fxq.graph import args_of, dtype_of, shape_of
from fxq.layer import Skip
from fxq.passes.rectified_spaattn.segments import Segments
from fxq.rewriting import insert_call

aten = torch.ops.aten


@dataclass(frozen=True)
class Padding:
    """What a mask says, as nodes of the graph.

    Args:
        text_len: valid text tokens of each sample `[B]`, int32.
        order: where in the sequence the keys come from that stand at each place, valid text first
            `[B, 1, S, 1]`, int64; None where they stand right already.
        queries: which queries see anything `[B, 1, S, 1]`, bool; None for all.
    """

    text_len: Node
    order: Node | None
    queries: Node | None


def find_padding(
    mask: Node | None, masks: Masks, segments: Segments, word: bool, before: Node
) -> Padding | Skip | None:
    """Insert what a mask says of each sample's text, or say why it cannot be said.

    Args:
        mask: attention's mask.
        masks: answers about it.
        segments: of its sequence.
        word: the user vouches for every mask (`TokenLayout.prefix_masks`).
        before: the attention, in front of which to insert.
    Returns:
        None where nothing is masked.
    """
    if mask is None or masks.hides_nothing(mask):
        return None
    if segments.lead or segments.is_open:
        return Skip(
            "expected no mask where text is on both sides of the visual tokens or as long as the "
            f"data say, found {dtype_of(mask)} {list(shape_of(mask))}",
            intended=False,
        )
    size, batch = segments.size, shape_of(args_of(before)[0])[0]
    parts = (mask, None) if shape_of(mask)[-2:-1] == (1,) else keys_and_queries(mask)
    keys, queries = parts or (mask, None)
    keys = _upright(keys, -2, before) if parts else keys
    if dtype_of(keys) != torch.bool or shape_of(keys) != (batch, 1, 1, size):
        return Skip(
            f"its mask is not key padding: expected bool [{batch}, 1, 1, {size}], or that for keys "
            f"and for queries, found {dtype_of(mask)} {list(shape_of(mask))}"
            + ("; TokenLayout(prefix_masks=True) is about the former only" if word else ""),
            intended=False,
        )
    if not segments.text_size:
        return Skip("its mask hides visual tokens: there is no text to be padded", intended=False)
    is_prefix = word or _is_prefix(keys, masks, segments)
    start, end = segments.text_start, segments.text_start + segments.text_size
    if not is_prefix:
        shown = masks.shown_for_sure(keys)
        if not bool(shown[:start].all() and shown[end:].all()):
            return Skip(
                "its mask cannot be proved to keep all visual tokens; if it keeps them and a "
                "prefix of the text, say so with TokenLayout(prefix_masks=True)",
                intended=False,
            )
    queries = queries and _upright(queries, -1, before)
    flat = insert_call(aten.select.int, (keys, 1, 0), before=before)
    flat = insert_call(aten.select.int, (flat, 1, 0), before=before)  # [B, S]
    text = insert_call(aten.slice.Tensor, (flat, 1, start, end), before=before)
    count = {"dtype": torch.int32}
    length = insert_call(aten.sum.dim_IntList, (text, [1]), count, before=before)
    order = None if is_prefix else _valid_first(text, segments, before)
    return Padding(length, order, queries)


def in_order(padding: Padding | None, node: Node, before: Node) -> Node:
    """Return keys or values `[B, H, S, D]` with the valid text in front of the rest."""
    if padding is None or padding.order is None:
        return node
    index = insert_call(aten.expand_as.default, (padding.order, node), before=before)
    return insert_call(aten.gather.default, (node, 2, index), before=before)


def of_seen_queries(padding: Padding | None, result: Node, before: Node) -> Node:
    """Return attention's result, 0 for queries that see nothing, as torch's attention has it."""
    if padding is None or padding.queries is None:
        return result
    return insert_call(aten.where.ScalarOther, (padding.queries, result, 0.0), before=before)


def _upright(part: Node, dim: int, before: Node) -> Node:
    """Return a mask with its size of 1 along `dim`, one of the last two."""
    if shape_of(part)[dim:][:1] == (1,):
        return part
    return insert_call(aten.transpose.int, (part, 2, 3), before=before)


def _is_prefix(keys: Node, masks: Masks, segments: Segments) -> bool:
    """Tell whether a mask provably keeps all visual tokens and a prefix of the text."""
    if segments.text_start == 0:
        return False  # a prefix of the whole sequence would hide visual tokens
    shown = masks.shows_at_least(keys)
    return shown is not None and shown >= segments.n_visual


def _valid_first(text: Node, segments: Segments, before: Node) -> Node:
    """Insert the order of keys: which `text` `[B, text_size]` is valid decides."""
    how = {"stable": True, "dim": 1, "descending": True}
    order = insert_call(aten.argsort.stable, (_as_int(text, before),), how, before=before)
    order = insert_call(aten.add.Tensor, (order, segments.text_start), before=before)
    sides = (segments.text_start, segments.size - segments.text_start - segments.text_size)
    visual = segments.size - segments.text_size
    place = {"dtype": torch.int64, "device": text.meta["val"].device}
    first = 0 if sides[0] else segments.text_size
    others = insert_call(aten.arange.start, (first, first + visual), place, before=before)
    zero = insert_call(aten.slice.Tensor, (order, 1, 0, 1), before=before)
    zero = insert_call(aten.mul.Scalar, (zero, 0), before=before)  # [B, 1], of whatever batch
    others = insert_call(aten.add.Tensor, (zero, others), before=before)
    parts = [others, order] if sides[0] else [order, others]
    every = insert_call(aten.cat.default, (parts, 1), before=before)
    for dim in (1, 3):
        every = insert_call(aten.unsqueeze.default, (every, dim), before=before)
    return every


def _as_int(node: Node, before: Node) -> Node:
    return insert_call(aten._to_copy.default, (node,), {"dtype": torch.int32}, before=before)
