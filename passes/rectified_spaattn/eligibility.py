"""Which attention `fxq::rectified_attention` can stand for, by its shapes and arguments."""

from collections.abc import Sequence

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxq.analysis.masks import Masks
from fxq.graph import args_of, hint, shape_of
from fxq.layer import Skip
from fxq.operators import operand
from fxq.passes.rectified_spaattn.segments import Segments

MAX_HEAD_DIM = 256  # of any attention kernel
ALIGNED = 8  # channels: what tensor cores load at once


def why_dense(node: Node, min_tokens: int, masks: Masks, segments: Segments | Skip) -> Skip | None:
    """Return why an attention of these shapes and arguments stays dense, None where it need not.

    Args:
        node: the attention.
        min_tokens: shorter sequences stay dense.
        masks: answers about its mask.
        segments: of its sequence, or why there are none.
    """
    if reason := why_unfit(node, masks):
        return reason
    n_queries, n_keys = (shape_of(part)[2] for part in args_of(node)[:2])
    if isinstance(segments, Skip) and str(n_queries) != str(n_keys):
        return segments
    if isinstance(segments, Segments) and segments.is_open:
        n_keys = segments.size
    return _why_not_worth_it(n_keys, min_tokens)


def why_unfit(node: Node, masks: Masks) -> Skip | None:
    """Return why an attention stays dense whatever its number of tokens, None where it need not.
    Arguments as for `why_dense`."""
    query, key, value = map(shape_of, args_of(node)[:3])
    shape, n_keys, head_dim = query, key[-2], value[-1]
    if operand(node, "dropout_p"):
        return Skip("dropout on the attention weights", intended=False)
    if operand(node, "is_causal") or masks.is_causal(operand(node, "attn_mask")):
        return Skip("causal attention: the method is for denoisers", intended=True)
    if len(shape) != 4:
        return Skip(f"expected [B, H, S, D], found {len(shape)} dimensions", intended=False)
    if str(shape[2]) != str(n_keys) and not _may_be_among(shape[2], n_keys):
        return Skip(f"cross-attention: {shape[2]} queries, {n_keys} keys", intended=True)
    if reason := _broadcast(query, key, value, shape_of(node)):
        return reason
    dims = (shape[3], head_dim)
    if any(not isinstance(d, int) or d % ALIGNED or d > MAX_HEAD_DIM for d in dims):
        return Skip(
            f"head sizes {dims}: expected multiples of {ALIGNED} up to {MAX_HEAD_DIM}",
            intended=False,
        )
    return None


def _may_be_among(n_queries: int | torch.SymInt, n_keys: int | torch.SymInt) -> bool:
    """Tell whether queries may be some of the keys: visual ones beside text that only is seen. Of
    numbers that depend on the data two symbols may be one number."""
    by_data = any(isinstance(n, torch.SymInt) and n.node.hint is None for n in (n_queries, n_keys))
    return by_data or 1 < hint(n_queries) < hint(n_keys)


def _why_not_worth_it(tokens: int | torch.SymInt, min_tokens: int) -> Skip | None:
    if statically_known_true(tokens < min_tokens):
        return Skip(f"{tokens} tokens: dense is faster below {min_tokens}", intended=True)
    if isinstance(tokens, torch.SymInt) and tokens.node.hint is None:
        return Skip("a size of it depends on the data", intended=False)
    if not isinstance(tokens, int):
        return Skip(
            "a free number of tokens; fix it (torch.compile: without mark_dynamic; fxq.compress: "
            "no such dimension in dynamic_shapes)",
            intended=False,
        )
    return None


def _broadcast(*shapes: Sequence[int | torch.SymInt]) -> Skip | None:
    """Return why query, key, value and result do not match in batch and heads, None where they do.

    Args:
        shapes: of the four, as they are in the graph.
    """
    if any(len(shape) != 4 for shape in shapes):
        found = [len(shape) for shape in shapes[:3]]
        return Skip(
            f"expected query, key and value [B, H, S, D], found {found} dimensions", intended=False
        )
    batches, heads = ([str(shape[dim]) for shape in shapes] for dim in (0, 1))
    if len(set(batches)) > 1:
        return Skip(
            f"expected query, key and value of one batch size, found {', '.join(batches[:3])}",
            intended=False,
        )
    n, n_key = shapes[0][1], shapes[1][1]
    grouped = isinstance(n, int) and isinstance(n_key, int) and n % n_key == 0
    if heads[1] != heads[2] or heads[0] != heads[3] or not (grouped or heads[0] == heads[1]):
        return Skip(
            "expected query heads a multiple of key heads, and as many value heads as those, found "
            f"{', '.join(heads[:3])}",
            intended=False,
        )
    return None
