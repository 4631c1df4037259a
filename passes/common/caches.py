"""Caches: buffers that a call adds rows to and that products read, found by where values flow.

The new value of a cache is its old one with rows written over it: `index_copy`, `index_put`, a
scatter of a slice, a `where`, a `cat` with a part of the old one. Nothing but these moves stands
between old and new value, so all nodes on the way can hold codes in the place of values. Whatever
else reads one of them must come to a product of two activations, as attention does with keys and
values, through views and copies alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.account import kind_of
from fxq.graph import args_of, dtype_of, is_constant, is_op, shape_of
from fxq.operators import COPIES, DIV, MUL, Movement, movement_of, of, operand
from fxq.writes import WRITTEN, written_inputs

aten = torch.ops.aten
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("matmul", "attention", "einsum")
MOVES = COPIES | of(
    Movement.VIEW, Movement.RESHAPE, Movement.TRANSPOSE, Movement.EXPAND, Movement.REARRANGE,
    Movement.SPLIT, Movement.ITEM,
)  # fmt: skip
INDEX_COPY, INDEX_PUT = (aten.index_copy.default,), (aten.index_put.default,)
SLICE_SCATTER, SELECT_SCATTER = (aten.slice_scatter.default,), (aten.select_scatter.default,)
SELECT, SLICE, CAT = (aten.select.int,), (aten.slice.Tensor,), (aten.cat.default,)
WHERE, OVERWRITE = (aten.where.self,), of(Movement.OVERWRITE)
SAME = (aten.clone.default, aten.contiguous.default)
WRITES = (
    *INDEX_COPY, *INDEX_PUT, *SLICE_SCATTER, *SELECT_SCATTER, *WHERE, *OVERWRITE,
    aten.index_add.default,
)  # fmt: skip


class NoCacheError(Exception):
    """Why a buffer stays float."""


@dataclass
class Cache:
    """A buffer that can hold codes.

    Attributes:
        state: the input that stands for it.
        name: of the buffer in the model.
        value: its new value.
        kept: nodes with values of the cache, by the axes of it that each lacks.
        rows: nodes with what is written, likewise.
        written: the axes along which rows are written.
        reads: (node of `kept`, what reads it).
        products: what the reads come to.
    """

    state: Node
    name: str
    value: Node
    kept: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    rows: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    reads: list[tuple[Node, Node]] = field(default_factory=list)
    products: dict[Node, None] = field(default_factory=dict)

    @property
    def scale_axes(self) -> tuple[int, ...]:
        """The axes with a scale for each index: neither the batch's nor those of writes."""
        ndim = len(shape_of(self.state))
        batch = {0} if ndim > 2 else set()
        return tuple(axis for axis in range(ndim) if axis not in self.written | batch)


def find_caches(gm: GraphModule) -> tuple[list[Cache], dict[str, tuple[str, list[Node]]]]:
    """Return the caches of a captured graph, and why other floating tensors that a call writes to
    stay float, by name, with the products that read them."""
    caches, left = [], dict[str, tuple[str, list[Node]]]()
    for state, value in written_inputs(gm):
        if not (dtype_of(state).is_floating_point or dtype_of(state).is_complex):
            continue  # a counter
        cache = Cache(state, str(state.meta.get("source", state.name)), value)
        try:
            _fill(cache)
            caches.append(cache)
        except NoCacheError as why:
            left[cache.name] = str(why), list(cache.products)
    return caches, left


def _fill(cache: Cache) -> None:
    """Follow a cache's values, or raise NoCacheError where it cannot hold codes."""
    state = cache.state
    cache.products |= dict.fromkeys(_products_after(state, cache.value))
    if "source" not in state.meta:
        raise NoCacheError("an argument of the call: its dtype is the caller's; make it a buffer")
    if dtype_of(state) not in FLOATS:
        raise NoCacheError(f"expected float32, bfloat16 or float16, found {dtype_of(state)}")
    if any(not isinstance(size, int) for size in shape_of(state)):
        raise NoCacheError(f"expected fixed sizes, found {list(shape_of(state))}")
    _walk(cache, cache.value, ())
    if state not in cache.kept:
        raise NoCacheError("its new value is not its old one with rows written over it")
    cache.reads = [
        (node, user)
        for node in cache.kept
        for user in node.users
        if user not in cache.kept and not _is_new_value(cache, node, user)
        and not is_op(user, aten.sym_size.int)
    ]  # fmt: skip
    cache.products = {}
    for _, user in cache.reads:
        cache.products |= dict.fromkeys(_products_from(user))
    if not cache.products:
        raise NoCacheError("no attention reads it")
    _check_rows(cache)


def _is_new_value(cache: Cache, node: Node, user: Node) -> bool:
    if user.op != "output":
        return False
    places = [place for place, result in enumerate(args_of(user)[0]) if result is node]
    return places == [cache.state.meta[WRITTEN]]


def _walk(cache: Cache, node: Node, lacks: tuple[int, ...]) -> None:
    """Note where the values of `node`, a value of the cache or what is written to it, come from."""
    if node in cache.kept or node in cache.rows:
        return
    if node is cache.state:
        cache.kept[node] = lacks
        return
    parts = _parts(cache, node, lacks)
    if parts is None or not any(_holds(cache, part) for part, _, _ in parts):
        cache.rows[node] = lacks
        return
    cache.kept[node] = lacks
    for part, missing, moved in parts:
        cache.written |= moved
        _walk(cache, part, missing)


def _holds(cache: Cache, node: Node) -> bool:
    """Tell whether a node has values of the cache's old value."""
    parts = None if node is cache.state else _parts(cache, node, ())
    return node is cache.state or any(_holds(cache, part) for part, _, _ in parts or ())


Part = tuple[Node, tuple[int, ...], set[int]]  # operand, the axes it lacks, those of the move


def _parts(cache: Cache, node: Node, lacks: tuple[int, ...]) -> list[Part] | None:
    """Return what a node puts together; None where it does more than to put together."""
    every = range(len(shape_of(cache.state)))
    axes = [axis for axis in every if axis not in lacks]

    def along(name: str = "dim") -> int:
        return axes[operand(node, name) % len(axes)]

    if is_op(node, *INDEX_COPY, *SLICE_SCATTER, *SELECT_SCATTER):
        source = operand(node, "source" if is_op(node, *INDEX_COPY) else "src")
        axis = along()
        missing = (*lacks, axis) if is_op(node, *SELECT_SCATTER) else lacks
        return [(operand(node, "self"), lacks, {axis}), (source, missing, {axis})]
    if is_op(node, *INDEX_PUT):
        return _parts_of_index_put(node, lacks, axes)
    if is_op(node, *SELECT):  # only of what a select_scatter puts back along the same axis
        whole = [axis for axis in every if axis not in lacks[:-1]]
        if lacks and whole[operand(node, "dim") % len(whole)] != lacks[-1]:
            return None
        return [(operand(node, "self"), lacks[:-1], set(lacks[-1:]))]
    if is_op(node, *SLICE):
        return [(operand(node, "self"), lacks, {along()})]
    if is_op(node, *CAT):
        axis = along()
        return [(part, lacks, {axis}) for part in operand(node, "tensors")]
    if is_op(node, *WHERE):
        return _parts_of_where(node, lacks, axes)
    if is_op(node, *OVERWRITE):
        return [(operand(node, name), lacks, set()) for name in ("self", "src")]
    return [(args_of(node)[0], lacks, set())] if is_op(node, *SAME) else None


def _parts_of_where(node: Node, lacks: tuple[int, ...], axes: list[int]) -> list[Part]:
    """Rows go along the axes in which the condition has more than one element."""
    sizes = shape_of(operand(node, "condition"))
    varying = {
        axis for axis, size in zip(reversed(axes), reversed(sizes), strict=False) if size != 1
    }
    return [(operand(node, name), lacks, varying) for name in ("self", "other")]


def _parts_of_index_put(node: Node, lacks: tuple[int, ...], axes: list[int]) -> list[Part] | None:
    indices = operand(node, "indices")
    given = [(axis, index) for axis, index in zip(axes, indices, strict=False) if index is not None]
    if operand(node, "accumulate") or len(given) != 1:
        return None
    axis, index = given[0]
    dims = len(shape_of(index))
    if dims > 1 or dtype_of(index) in (torch.bool, torch.uint8):
        return None
    missing = lacks if dims else (*lacks, axis)
    return [(operand(node, "self"), lacks, {axis}), (operand(node, "values"), missing, {axis})]


def _check_rows(cache: Cache) -> None:
    sizes = shape_of(cache.state)
    for node, lacks in cache.rows.items():
        axes = [axis for axis in range(len(sizes)) if axis not in lacks]
        found = shape_of(node)
        pairs = zip(axes, found, strict=False)
        if len(found) != len(axes) or any(
            axis in cache.scale_axes and size not in (1, sizes[axis]) for axis, size in pairs
        ):
            raise NoCacheError(
                f"expected rows like those of {list(sizes)}, found {node.name} {list(found)}"
            )


def _products_from(user: Node) -> Iterator[Node]:
    """Yield the products that a read comes to, or raise for anything else it comes to."""
    if user.op == "output":
        raise NoCacheError("the model returns it, or a part of it")
    if kind_of(user) in PRODUCTS and not any(map(is_constant, user.all_input_nodes)):
        yield user
    elif is_op(user, *MOVES) or _is_scaling(user):
        for further in user.users:
            yield from _products_from(further)
    elif movement_of(user) is not Movement.SHAPE_ONLY or not is_op(user, aten.sym_size.int):
        raise NoCacheError(
            f"{user.target} ({user.name}) reads it, which is no product of attention"
        )


def _products_after(*nodes: Node) -> Iterator[Node]:
    """Yield the products that values of nodes come to through moves and writes, whatever else
    reads them."""
    seen, reached = {*nodes}, [*nodes]
    while reached:
        for user in reached.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if kind_of(user) in PRODUCTS:
                yield user
            elif is_op(user, *MOVES, *WRITES):
                reached.append(user)


def _is_scaling(node: Node) -> bool:
    """Tell whether a node multiplies by a number."""
    numbers: Any = [isinstance(arg, int | float) for arg in args_of(node)[1:2]]
    return is_op(node, *MUL, *DIV) and all(numbers)
