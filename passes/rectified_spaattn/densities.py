"""Densities: which share of the key blocks each layer keeps, at every step or by row.

They are a table `[rows, layers]` in a buffer, and which row holds is decided in the graph, by a
tensor (`fxq.rows`): one compiled graph serves dense and sparse steps alike. A density of 1 or more
is dense, exactly. The table can be changed in place between calls (`set_densities`) without
compiling again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import RUNTIME_STATE, shape_of, val_of
from fxq.rewriting import add_buffer, insert_call
from fxq.row_choice import index_of, runtime_states
from fxq.rows import ByPosition, Rows

aten = torch.ops.aten
TABLE = f"{RUNTIME_STATE}.densities"


def check_densities(densities: Sequence[float], rows: Rows | None) -> None:
    """Raise ValueError unless there is a positive density for each row."""
    numbers = all(isinstance(density, int | float) for density in densities)
    if not densities or not numbers or any(not density > 0 for density in densities):
        raise ValueError(
            "density: expected positive shares of the key blocks (1 or more: dense), found "
            f"{densities}"
        )
    if isinstance(rows, ByPosition):
        raise ValueError("rows: a density holds for all tokens; use ByTimestep or ByStep")
    expected = 1 if rows is None else rows.count
    if len(densities) != expected:
        raise ValueError(
            f"density: expected one for each of {expected} rows ({rows}), found {densities}"
        )


def density_table(densities: Sequence[float], layers: Sequence[float | None]) -> Tensor:
    """Return the densities `[rows, layers]`, fp32.

    Args:
        densities: of each row, for layers that have none of their own.
        layers: each layer's own density in sparse rows, None for the row's. Dense rows stay dense.
    """
    every = torch.tensor(densities)[:, None].expand(-1, len(layers))
    own = torch.tensor([float("nan") if density is None else density for density in layers])
    return torch.where(own.isnan() | (every >= 1), every, own)


def insert_densities(gm: GraphModule, table: Tensor, rows: Rows | None, before: Node) -> list[Node]:
    """Insert the table and the choice of its row; return each layer's density, 0-d fp32.

    Of several time-steps in a batch the largest counts: the layout of blocks is the batch's.

    Args:
        gm: the graph.
        table: `[rows, layers]`.
        rows: what chooses; None for a single row.
        before: where to insert; on its device.
    Raises:
        ValueError: the model has no such time-step input.
    """
    table = table.to(val_of(before).device)
    values = add_buffer(gm, TABLE, table, like=before)
    if rows is None:
        row = insert_call(aten.select.int, (values, 0, 0), before=before)
    else:
        index = index_of(gm, rows, before)
        if shape_of(index):
            index = insert_call(aten.amax.default, (index,), before=before)
        row = insert_call(aten.index.Tensor, (values, [index]), before=before)
    return [
        insert_call(aten.select.int, (row, 0, layer), before=before)
        for layer in range(table.shape[1])
    ]


def set_densities(program: nn.Module, densities: Tensor | Sequence[Sequence[float]]) -> None:
    """Replace the densities of a program in place.

    Args:
        program: what `fxq.compress` returned, or `torch.compile` of it.
        densities: `[rows, layers]`, > 0, as many as the program has.
    Raises:
        ValueError: another shape, densities that are not positive, or a program without any or
            with several tables.
    """
    tables = runtime_states(program, "densities", "it has no sparse attention")
    if len(tables) > 1:
        raise ValueError(
            f"program: expected one ReplaceAttention in its recipe, found {len(tables)} tables of "
            "densities; put their densities into one pass (overrides=...)"
        )
    (table,) = tables
    values = torch.as_tensor(densities, dtype=table.dtype, device=table.device)
    if values.shape != table.shape or not bool((values > 0).all()):
        raise ValueError(
            f"densities: expected positive numbers {list(table.shape)} (rows, layers), found "
            f"{list(values.shape)} with {int((~(values > 0)).sum())} that are not positive"
        )
    table.copy_(values)
