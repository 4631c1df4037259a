"""The tokens of an attention as the operator takes them, and its results as the model does.

Inside the operator there are visual tokens and one text segment, all of them ask and are asked, and
their number is known. A model may have it otherwise:

- Text that is keys and values only. Its rows get queries of zeros, and their results are dropped;
  what is left are the equations of visual rows, whose blocks compete with the text's keys in one
  softmax.
- Text on both sides. What is in front goes behind the visual tokens; softmax does not see the
  order.
- As much text at the end as the data say. It is padded to the most there can be, and the operator
  is told how much of it is valid.
"""

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxq.graph import args_of, shape_of
from fxq.passes.rectified_spaattn.segments import Segments
from fxq.rewriting import insert_call

aten = torch.ops.aten


@dataclass(frozen=True)
class Taken:
    """What the operator takes, as nodes of the graph.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, Hkv, S, D]`.
        value: `[B, Hkv, S, Dv]`.
        text_len: valid text tokens of each sample `[B]`, int32; None for all.
        sides: tokens that are there and those that are missing from S, None where all are there.
    """

    query: Node
    key: Node
    value: Node
    text_len: Node | None
    sides: tuple[Node, Node] | None


def arrange(node: Node, segments: Segments) -> Taken:
    """Insert what brings an attention's operands into the operator's form."""
    query, key, value = args_of(node)[:3]
    if segments.n_queries < segments.size:
        rows = [segments.text_size, 0] if segments.text_start == 0 else [0, segments.text_size]
        query = insert_call(aten.constant_pad_nd.default, (query, [0, 0, *rows]), before=node)
    text_len = sides = None
    if segments.is_open:
        query, sides = _pad(query, segments, node)
        (key, (there, _)), (value, _) = (_pad(x, segments, node) for x in (key, value))
        text_len = _text_len(there, query, segments, node)
    visual = segments.lead, segments.lead + segments.n_visual
    query, key, value = (_to_front(x, visual, segments, node) for x in (query, key, value))
    return Taken(query, key, value, text_len, sides)


def put_back(result: Node, taken: Taken, segments: Segments, before: Node) -> Node:
    """Return the operator's results `[B, H, S, Dv]` as the model's `[B, H, n_queries, Dv]`."""
    after_visual = segments.n_visual, segments.n_visual + segments.lead
    result = _to_front(result, after_visual, segments, before)
    if taken.sides is not None:
        split = aten.split_with_sizes.default
        parts = insert_call(split, (result, list(taken.sides), 2), before=before)
        return insert_call(operator.getitem, (parts, 0), before=before)
    if segments.n_queries == segments.size:
        return result
    start = segments.text_size if segments.text_start == 0 else 0
    args = (result, 2, start, start + segments.n_queries)
    return insert_call(aten.slice.Tensor, args, before=before)


def _pad(x: Node, segments: Segments, before: Node) -> tuple[Node, tuple[Node, Node]]:
    """Return `[B, H, S, D]`, and how many of the S tokens are there and how many are missing."""
    there = insert_call(aten.sym_size.int, (x, 2), before=before)
    missing = insert_call(operator.sub, (segments.size, there), before=before)
    sides = [0, 0, 0, missing]
    return insert_call(aten.constant_pad_nd.default, (x, sides), before=before), (there, missing)


def _text_len(there: Node, query: Node, segments: Segments, before: Node) -> Node:
    batch: int | torch.SymInt | Node = shape_of(query)[0]
    if not isinstance(batch, int):
        batch = insert_call(aten.sym_size.int, (query, 0), before=before)
    valid = insert_call(operator.sub, (there, segments.n_visual), before=before)
    how = {"dtype": torch.int32, "device": query.meta["val"].device}
    return insert_call(aten.full.default, ([batch], valid), how, before=before)


def _to_front(x: Node, part: tuple[int, int], segments: Segments, before: Node) -> Node:
    """Return `[B, H, S, D]` with a part of the sequence in front of all others."""
    if not segments.lead:
        return x
    (start, end), every = part, (0, segments.size)
    cuts = [(start, end), (every[0], start), (end, every[1])]
    parts = [insert_call(aten.slice.Tensor, (x, 2, *cut), before=before) for cut in cuts]
    return insert_call(aten.cat.default, (parts, 2), before=before)
