"""Which forms of attention `fxq::rectified_attention` can stand for."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxq.constants import constant_value
from fxq.graph import args_of, dtype_of, hint, is_op, shape_of, val_of
from fxq.layer import Skip
from fxq.passes.rectified_spaattn.padding import origin

aten = torch.ops.aten
MAX_HEAD_DIM = 256  # of any attention kernel
ALIGNED = 8  # channels: what tensor cores load at once
AND = (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)


def unfit(node: Node, min_tokens: int, causal: Collection[Node]) -> Skip | None:
    """Return why attention of this form stays dense, None where its form fits.

    Args:
        node: the attention.
        min_tokens: shorter sequences stay dense.
        causal: the masks that `is_causal` is true of.
    """
    query, key, value = map(shape_of, args_of(node)[:3])
    shape, n_keys, head_dim = query, key[-2], value[-1]
    if option(node, 4, "dropout_p", 0.0):
        return Skip("dropout on the attention weights", intended=False)
    if option(node, 5, "is_causal", False) or option(node, 3, "attn_mask", None) in causal:
        return Skip("causal attention: the method is for denoisers", intended=True)
    if len(shape) != 4:
        return Skip(f"expected [B, H, S, D], found {len(shape)} dimensions", intended=False)
    if str(shape[2]) != str(n_keys):
        return Skip(f"cross-attention: {shape[2]} queries, {n_keys} keys", intended=True)
    if not isinstance(shape[2], int):
        return Skip(
            "a free number of tokens; fix it (torch.compile: dynamic=False)", intended=False
        )
    if shape[2] < min_tokens:
        return Skip(f"{shape[2]} tokens: dense is faster below {min_tokens}", intended=True)
    if reason := _broadcast(query, key, value, shape_of(node)):
        return reason
    dims = (shape[3], head_dim)
    if any(not isinstance(d, int) or d % ALIGNED or d > MAX_HEAD_DIM for d in dims):
        return Skip(
            f"head sizes {dims}: expected multiples of {ALIGNED} up to {MAX_HEAD_DIM}",
            intended=False,
        )
    return None


def is_causal(mask: Any) -> bool:
    """Tell whether a boolean mask hides from every query the keys behind it, whatever the data."""
    mask = origin(mask)
    if not isinstance(mask, Node) or dtype_of(mask) != torch.bool:
        return False
    if is_op(mask, *AND):
        return any(map(is_causal, args_of(mask)))
    if len(shape_of(mask)) < 2 or not 1 != shape_of(mask)[-1] == shape_of(mask)[-2]:
        return False
    value = _at_capture(mask)
    return value is not None and not bool(value.triu(1).any())


def _at_capture(node: Node) -> Tensor | None:
    """Return what depends on constants and sizes only, free sizes as at capture; None for more."""
    needed, todo = set[Node](), [node]
    while todo:
        read = todo.pop()
        if read in needed:
            continue
        needed.add(read)
        if _is_given(read):
            continue
        target = read.target
        random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
        if not isinstance(target, torch._ops.OpOverload) or random:
            return None
        todo += read.all_input_nodes
    known: dict[Node, Any] = {}
    for read in node.graph.nodes:
        if read in needed and _is_given(read):
            known[read] = constant_value(read) if read.op == "get_attr" else hint(val_of(read))
        elif read in needed:
            args, kwargs = map_arg((read.args, read.kwargs), known.__getitem__)
            known[read] = read.target(*args, **kwargs)
    return known[node]


def _is_given(node: Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), int | torch.SymInt)


def option(attention: Node, index: int, name: str, default: Any) -> Any:
    """Return an argument of `aten.scaled_dot_product_attention`, however it was given."""
    args = args_of(attention)
    return args[index] if len(args) > index else attention.kwargs.get(name, default)


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
