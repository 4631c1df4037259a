"""`fxq::cache_attention` for attention that reads a cache kept as int8 codes.

    attention(q, [repeated] moved(decode(codes)), ...)  ->  cache_attention(q, moved(codes), ...)

Moves are transpositions and slices, which of codes are views. Heads that are repeated because
queries share them are not repeated any more. Without the kernel a step makes a float copy of the
whole cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.fx import Node

import fxq.lowering.cache_attention  # noqa: F401  registers the op
from fxq.cache_codes import NOT_FINITE
from fxq.graph import args_of, dtype_of, is_op, shape_of
from fxq.lowering.cpu.cache_attention import VECTOR
from fxq.lowering.cpu.native import native
from fxq.lowering.rule import Decision, Lowering, Rule
from fxq.numerics import sqnr_db
from fxq.operators import DENSE_ATTENTION, Movement, of, operand
from fxq.rewriting import insert_call

aten = torch.ops.aten
ops = torch.ops.fxq

SLICE, REPEAT = aten.slice.Tensor, aten.repeat_interleave.self_int
COPIES = (aten.clone.default, aten.contiguous.default)
VIEWS, TRANSPOSE = of(Movement.VIEW), (aten.permute.default, aten.transpose.int)
N_AXES = 4
# Scores are sums of products in fp32, and exp makes of their absolute errors relative ones: between
# this and torch's attention are 124 dB where the largest score is 4, 115 dB where it is 130.
MIN_SQNR_DB = 100.0


class Cached(NamedTuple):
    """Values of a cache on their way to attention.

    Args:
        codes: of the cache.
        scale: of the codes.
        moves: of the values, the first one last.
    """

    codes: Node
    scale: Node
    moves: tuple[Node, ...] = ()

    def before(self, node: Node) -> tuple[Node, Node]:
        """Insert the moves, of codes and scale, and return what they give."""
        codes, scale = self.codes, self.scale
        for move in reversed(self.moves):
            rest = args_of(move)[1:]
            codes = insert_call(move.target, (codes, *rest), before=node)
            if not is_op(move, SLICE) or shape_of(scale)[operand(move, "dim")] != 1:
                scale = insert_call(move.target, (scale, *rest), before=node)
        return codes, scale


def cached(value: Any) -> Cached | None:
    """Return which cache a value is of, moved; None where it is of none."""
    if is_op(value, *TRANSPOSE, SLICE):
        found = cached(args_of(value)[0])
        return None if found is None else found._replace(moves=(value, *found.moves))
    if is_op(value, *COPIES):
        return cached(args_of(value)[0])
    if not is_op(value, aten.masked_fill.Scalar):
        return None
    read, bad, nan = args_of(value)
    if not is_op(read, ops.dequantize.default) or not is_op(bad, aten.eq.Scalar) or nan == nan:
        return None
    codes, scale, zero, dtype = args_of(read)
    compared, code = args_of(bad)
    compared = args_of(compared)[0] if is_op(compared, aten._to_copy.default) else compared
    same = compared is codes and code == NOT_FINITE
    return Cached(codes, scale) if same and zero is None and dtype == torch.float32 else None


def unrepeated(value: Any) -> Any:
    """Return keys or values before each head was repeated for the queries that share it."""
    if is_op(value, REPEAT):
        axis = operand(value, "dim")
        return args_of(value)[0] if axis in (1, 1 - N_AXES) else value
    inner = args_of(value)[0] if is_op(value, *VIEWS) else None
    while is_op(inner, *COPIES):
        inner = args_of(inner)[0]
    if not is_op(inner, aten.expand.default) or not is_op(
        args_of(inner)[0], aten.unsqueeze.default
    ):
        return value
    source, axis = args_of(args_of(inner)[0])
    batch, heads, n, *rest = shape_of(inner)
    repeats = shape_of(args_of(inner)[0])[2] == 1 and axis in (2, 2 - N_AXES - 1)
    together = [batch, heads * n, *rest] == [*shape_of(value)]
    return source if repeats and together and len(shape_of(source)) == N_AXES else value


@dataclass(frozen=True)
class CacheAttention(Rule):
    """`fxq.lowering.cpu.cache_attention`."""

    instead: ClassVar[str] = "every call makes a float copy of its cache"

    def is_for(self, node: Node) -> bool:
        if not is_op(node, *DENSE_ATTENTION):
            return False
        return any(cached(unrepeated(operand(node, name))) for name in ("key", "value"))

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        caches = [cached(unrepeated(operand(node, name))) for name in ("key", "value")]
        if why := _why_not(node, caches):
            return Decision(None, why)
        if isinstance(unavailable := native("cache_attention"), str):
            return Decision(None, unavailable)
        query, mask, scale = (operand(node, name) for name in ("query", "attn_mask", "scale"))
        if scale is None:
            scale = int(shape_of(query)[-1]) ** -0.5
        args: list[Any] = [query]
        for cache in caches:
            args += cache.before(node)  # type: ignore[union-attr]
        new = insert_call(ops.cache_attention.default, (*args, mask, scale), before=node)
        self.replace(node, new)
        node.graph.erase_node(node)  # else it stays, as it could draw numbers for dropout
        return Decision("cache_attention (AVX2)")

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> tuple[bool, bool]:
        return True, sqnr_db(expected, found) >= MIN_SQNR_DB


def _why_not(node: Node, caches: list[Cached | None]) -> str | None:
    """Return why the kernel does not take an attention, None where it does."""
    query, mask = operand(node, "query"), operand(node, "attn_mask")
    keys, values = (shape_of(operand(node, name)) for name in ("key", "value"))
    batch, *_, width = shape_of(query)
    if None in caches:
        return "it reads keys or values that are no int8 cache"
    if dtype_of(query) != torch.float32:
        return f"the kernel reads float32 queries, found {dtype_of(query)}"
    if mask is not None and dtype_of(mask) not in (torch.bool, torch.float32):
        return f"the kernel reads a mask of bool or float32, found {dtype_of(mask)}"
    if len(keys) != N_AXES or len(shape_of(query)) != N_AXES or keys[0] != batch:
        return f"expected keys [B, G, L, D] for queries {[*shape_of(query)]}, found {[*keys]}"
    if operand(node, "is_causal") or operand(node, "dropout_p"):
        return "the kernel takes a mask, neither is_causal nor dropout"
    if isinstance(operand(node, "scale"), Node):
        return "its scale is computed at run time"
    if any(not isinstance(size, int) or size % VECTOR for size in (width, values[-1])):
        return f"heads of {width} and {values[-1]} channels: expected multiples of {VECTOR}"
    return None
