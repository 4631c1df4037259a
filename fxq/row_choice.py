"""Rows in a graph: the index that chooses them, the tables they are in, and `set_step`.

There is one index per graph for equal `Rows`, and one table per index: all scales that go by it lie
side by side in its columns and are gathered at once. An index is a number (all tokens of the batch
have one row), `[B]` (each sample has one), `[T]` or `[B, T]` (each token).
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.errors import MissingInputError, UnsupportedError, did_you_mean
from fxq.graph import RUNTIME_STATE, args_of, input_name, shape_of, tensor_of, val_of
from fxq.rewriting import add_buffer, copy_graph, insert_call
from fxq.rows import ByLength, ByPosition, ByStep, ByTimestep, Rows

aten = torch.ops.aten
LEVELS, STEP = (f"{RUNTIME_STATE}.{name}" for name in ("levels", "step"))
KNOWN_LEVELS = f"{RUNTIME_STATE}.known_levels"  # no call is watched for those
LENGTHS = "lengths"
ROWS = "fxq_rows"  # key in the meta of an index: what it is the index of


def index_of(gm: GraphModule, rows: Rows, edge: Node) -> Node:
    """Return the index of `rows`, int64, inserted where the graph has none yet.

    Args:
        gm: the graph.
        rows: what chooses.
        edge: what is quantized by it: tokens may be counted along it, and values are of its
            device.
    Raises:
        MissingInputError: the model has no such input.
        UnsupportedError: tokens are counted along an axis that the edge lacks.
    """
    if why := why_not_counted(shape_of(edge), rows):
        raise UnsupportedError(why)
    tokens = shape_of(edge)[-2] if _is_counted(rows) else None
    key = (rows, str(tokens))
    # Where sizes are free, an index comes after the first edge that it was counted along.
    known = (node for node in gm.graph.nodes if node.meta.get(ROWS) == key)
    index = next((node for node in known if all(node < user for user in edge.users)), None)
    if index is None:
        index = _insert_index(gm, rows, edge, tokens)
        index.meta[ROWS] = key
    return index


def fitting_index(gm: GraphModule, rows: Rows, edge: Node) -> tuple[Node | None, str]:
    """Return the index that says which row each element of an edge has, or None and why there is
    none. Where heads are part of the batch, `[B * H, ...]`, each sample's row is its heads' too.

    Args:
        gm: the graph.
        rows: what chooses.
        edge: what is quantized by it.
    Raises:
        MissingInputError: the model has no such input.
    """
    if why := why_not_counted(shape_of(edge), rows):
        return None, why
    index = index_of(gm, rows, edge)
    why = why_unfit(shape_of(index), shape_of(edge), rows)
    if why and (heads := _heads(index, edge, rows)):
        return _repeated(index, heads), ""
    return (None, why) if why else (index, "")


def _heads(index: Node, edge: Node, rows: Rows) -> int:
    """Return how many heads of each sample lie side by side in the first dimension of an edge, 0
    where it is not made so: by a view of `[B, H, ...]` as `[B * H, ...]`."""
    batch, merged, node = shape_of(index), str(shape_of(edge)[0]), edge
    while isinstance(rows, ByTimestep) and isinstance(val_of(node), Tensor):
        if [str(size) for size in shape_of(node)[:1]] != [merged] or not node.args:
            return 0
        source = args_of(node)[0]
        if not isinstance(source, Node) or not isinstance(val_of(source), Tensor):
            return 0
        before, after = shape_of(source), shape_of(node)
        split = [str(size) for size in (*batch, *before[1:2], *after[1:])]
        if [str(size) for size in before] == split and isinstance(before[1], int):
            return int(before[1])
        node = source
    return 0


def _repeated(index: Node, heads: int) -> Node:
    """Return an index of samples as one of their heads, the same for equal numbers of heads."""
    key = (*index.meta[ROWS], heads)
    for user in index.users:
        if user.meta.get(ROWS) == key:
            return user
    made = insert_call(aten.repeat_interleave.self_int, (index, heads), after=index)
    made.meta[ROWS] = key
    return made


def _insert_index(gm: GraphModule, rows: Rows, edge: Node, tokens: Any) -> Node:
    device = val_of(edge).device
    first = next(n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr"))
    if isinstance(rows, ByStep):
        counter = add_buffer(gm, STEP, torch.zeros((), dtype=torch.int64, device=device), like=edge)
        return insert_call(aten.clamp.default, (counter, 0, rows.count - 1), before=first)
    if isinstance(rows, ByTimestep):
        given = input_node(gm, rows.name, "ByTimestep.name")
        levels = KNOWN_LEVELS if rows.known else LEVELS
        bounds = add_buffer(gm, levels, torch.tensor(rows.levels, device=device), like=edge)
        if shape_of(given) == (1,):  # one for the whole batch
            given = insert_call(aten.select.int, (given, 0, 0), before=first)
        given = _cast(given, torch.float32, first)
        return insert_call(aten.bucketize.Tensor, (given, bounds), before=first)
    if isinstance(rows, ByPosition) and rows.name is not None:
        row = input_node(gm, rows.name, "ByPosition.name")
        row = _cast(row, torch.int64, first)
    else:
        if not isinstance(tokens, int):
            tokens = insert_call(aten.sym_size.int, (edge, len(shape_of(edge)) - 2), after=edge)
        kwargs = {"dtype": torch.int64, "device": device}
        where = {"after": tokens} if isinstance(tokens, Node) else {"before": first}
        if isinstance(rows, ByLength):
            bounds = add_buffer(gm, LENGTHS, torch.tensor(rows.lengths, device=device), like=edge)
            length = insert_call(aten.full.default, ((), tokens), kwargs, **where)
            row = insert_call(aten.bucketize.Tensor, (length, bounds), after=length)
        else:
            row = insert_call(aten.arange.default, (tokens,), kwargs, **where)
    return insert_call(aten.clamp.default, (row, 0, rows.count - 1), after=row)


def _cast(node: Node, dtype: torch.dtype, before: Node) -> Node:
    return insert_call(aten._to_copy.default, (node,), {"dtype": dtype}, before=before)


def input_node(gm: GraphModule, name: str, where: str) -> Node:
    """Return the input of a name, which holds a tensor.

    Args:
        gm: the graph.
        name: of the model's argument.
        where: that was asked for, for the error.
    Raises:
        MissingInputError: there is none.
    """
    inputs = {input_name(n): n for n in gm.graph.find_nodes(op="placeholder")}
    if name not in inputs or not isinstance(val_of(inputs[name]), Tensor):
        raise MissingInputError(
            f"{where}: no input {name!r} of the model is a tensor; {did_you_mean(name, inputs)}"
        )
    return inputs[name]


def why_not_counted(edge: Sequence[Any], rows: Rows) -> str:
    """Return why tokens cannot be counted along an edge of a shape, "" where they can."""
    if not _is_counted(rows) or len(edge) >= 3:
        return ""
    named = "name the argument that holds positions, or " if isinstance(rows, ByPosition) else ""
    return (
        f"rows {rows} are counted along the token axis of [batch, token, channel], found "
        f"{list(edge)}; {named}leave this layer out"
    )


def _is_counted(rows: Rows) -> bool:
    """Tell whether rows go by the number of tokens of what they are for."""
    return isinstance(rows, ByLength) or (isinstance(rows, ByPosition) and rows.name is None)


def why_unfit(index: Sequence[Any], edge: Sequence[Any], rows: Rows) -> str:
    """Return why an index does not say which row each element of an edge has, "" where it does.

    Args:
        index: shape of the index.
        edge: shape of what is quantized by it.
        rows: whose index it is.
    """
    expected: list[Any] = []
    if isinstance(rows, ByTimestep):
        expected = [*edge[:1]]
    elif isinstance(rows, ByPosition):
        expected = [edge[0], edge[-2]] if len(index) == 2 else [*edge[-2:-1]]
    fits = [str(size) for size in index] == [str(size) for size in expected] or not len(index)
    if not fits or (len(index) == 2 and len(edge) != 3):
        need = "[batch, token, channel]" if isinstance(rows, ByPosition) else "the batch first"
        return f"rows {rows} need {need}: an index of shape {list(index)} does not fit {list(edge)}"
    return ""


def assumed(index: Sequence[Any], edge: Sequence[Any]) -> str:
    """Return what is taken for granted where an index fits an edge by a fixed size that the edge
    has twice, "" where nothing is: only free sizes tell the batch from another dimension."""
    if len(index) != 1 or not isinstance(index[0], int) or list(edge).count(index[0]) < 2:
        return ""
    return f"the first dimension of {list(edge)} is taken for the batch: its size is fixed"


def pick(table: Tensor, index: Tensor, rows: Rows) -> Tensor:
    """Return the rows of a table in a shape that broadcasts against what they are for.

    Args:
        table: `[rows, *scale]`, where scale is of as many dimensions as the tensor.
        index: int64, as `index_of` gives it.
        rows: whose index it is.
    Returns:
        `scale`, with the index's dimensions in the place of those of size 1 that they are of.
    """
    shape = aligned_shape(table.shape[1:], index.shape, rows)
    return table.flatten(1)[index].reshape(shape)


def aligned_shape(scale: Sequence[int], index: Sequence[Any], rows: Rows) -> list[Any]:
    """Return the shape of picked rows: see `pick`."""
    shape: list[Any] = list(scale)
    if len(index) == 2:
        shape[0], shape[-2] = index
    elif len(index) == 1:
        shape[-2 if isinstance(rows, ByPosition) else 0] = index[0]
    return shape


def insert_tables(
    gm: GraphModule, wanted: Mapping[str, tuple[Node, Rows, Tensor]]
) -> dict[str, Node]:
    """Insert the tables, one gather per index and dtype, and each entry's rows.

    Args:
        gm: the graph.
        wanted: name -> index, whose it is, and the entry's table `[rows, *scale]`.
    Returns:
        name -> what `pick` gives.
    """
    groups: dict[tuple[Node, torch.dtype], list[str]] = {}
    for name, (index, _, table) in wanted.items():
        groups.setdefault((index, table.dtype), []).append(name)
    found: dict[str, Node] = {}
    for (index, dtype), names in groups.items():
        columns = [wanted[name][2].flatten(1) for name in names]
        kind = "scales" if dtype.is_floating_point else "zero_points"
        values = add_buffer(gm, f"table_of_{kind}", torch.cat(columns, 1), like=index)
        picked = last = insert_call(aten.index.Tensor, (values, [index]), after=index)
        first = 0
        for name, column in zip(names, columns, strict=True):
            _, rows, entries = wanted[name]
            place = (-1, first, column.shape[1])
            last = insert_call(aten.narrow.default, (picked, *place), after=last)
            sizes = shape_of(index)
            if len(sizes) < 2:  # of [B, T] they lie as they are wanted, [B, T, C]
                # -1: as many as the index has in a call, which may have been free or not.
                shape = aligned_shape(entries.shape[1:], [-1] * len(sizes), rows)
                last = insert_call(aten.reshape.default, (last, shape), after=last)
            found[name] = last
            first += column.shape[1]
    return found


def set_step(program: nn.Module, step: int) -> None:
    """Tell a program whose parameters go by step (`ByStep`) which step comes next.

    Args:
        program: what `fxq.compress` returned, or `torch.compile` of it.
        step: 0 for the first.
    Raises:
        ValueError: a negative step, or a program without a counter.
    """
    if step < 0:
        raise ValueError(f"step: expected 0 or more, found {step}")
    for counter in runtime_states(program, "step", "nothing in it goes by ByStep"):
        counter.fill_(step)


class RowsUsed:
    """Tells which rows a batch uses, of an observed graph."""

    def __init__(self, gm: GraphModule) -> None:
        self.chooser = copy_graph(gm)
        chosen = [
            node
            for node in self.chooser.graph.nodes
            if ROWS in node.meta and any(user.op == "call_module" for user in node.users)
        ]
        self.chooser.graph.output_node().args = (tuple(chosen),)
        self.chooser.graph.eliminate_dead_code()
        self.chooser.recompile()

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Any]) -> set[tuple[int, int]]:
        """Return pairs of an index, by number, and a row of its table."""
        indices = enumerate(self.chooser(*inputs))
        return {(k, row) for k, index in indices for row in index.unique().tolist()}


@contextlib.contextmanager
def counted_steps(gm: GraphModule, batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Give batches that set the counters of observed steps while they are read: batch i is step i,
    from 0 again after the last one. At the end the counters are 0."""
    counters = [
        (tensor_of(gm, args_of(node)[0]), node.meta[ROWS][0].count)
        for node in gm.graph.nodes
        if ROWS in node.meta and isinstance(node.meta[ROWS][0], ByStep)
        if any(user.op == "call_module" for user in node.users)
    ]

    def counted() -> Iterator[Any]:
        for index, batch in enumerate(batches):
            for counter, count in counters:
                counter.fill_(index % count)
            yield batch

    try:
        yield counted()
    finally:
        for counter, _ in counters:
            counter.zero_()


def runtime_states(program: nn.Module, name: str, why: str) -> list[Tensor]:
    """Return the buffers that passes keep under `name` to be changed between calls.

    Raises:
        ValueError: there is none; `why` says what that means.
    """
    state: Any = getattr(getattr(program, "graph_module", program), RUNTIME_STATE, None)
    buffers = state.named_buffers() if isinstance(state, nn.Module) else ()
    found = [value for key, value in buffers if key.rstrip("0123456789") in (name, f"{name}_")]
    if not found:
        raise ValueError(
            f"program: expected one whose recipe sets {name!r}, found {type(program).__name__} "
            f"without: {why}"
        )
    return found
