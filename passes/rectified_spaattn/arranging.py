"""The tokens of an attention as the operator takes them, and its results as the model does.

Inside the operator every token asks and is asked. A model whose text is keys and values only has
no queries there: the rows of text get queries of zeros, and their results are dropped. What is
left are the equations of visual rows, whose blocks compete with the text's keys in one softmax.
"""

import torch
from torch.fx import Node

from fxq.passes.rectified_spaattn.segments import Segments
from fxq.rewriting import insert_call

aten = torch.ops.aten


def all_queries(query: Node, segments: Segments, before: Node) -> Node:
    """Return queries `[B, H, S, D]`, one for each key, of the model's `[B, H, n_queries, D]`."""
    if segments.n_queries == segments.size:
        return query
    sides = [segments.text_size, 0] if segments.text_start == 0 else [0, segments.text_size]
    return insert_call(aten.constant_pad_nd.default, (query, [0, 0, *sides]), before=before)


def own_results(result: Node, segments: Segments, before: Node) -> Node:
    """Return the results `[B, H, n_queries, Dv]` of the model's own queries."""
    if segments.n_queries == segments.size:
        return result
    start = segments.text_size if segments.text_start == 0 else 0
    args = (result, 2, start, start + segments.n_queries)
    return insert_call(aten.slice.Tensor, args, before=before)
