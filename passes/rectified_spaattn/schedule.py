"""Density schedules: which share of the key blocks each layer keeps at each denoising step.

The densities are a table `[rows, layers]` in a buffer, and which row holds is decided in the graph,
by a tensor: one compiled graph serves dense and sparse steps alike. Three kinds:

    0.2                                             one row
    ByTimestep(levels=(800,), densities=(0.2, 1))   by the noise level, which the model is told
                                                    anyway: works on an unmodified pipeline
    ByStep(densities=(1, 1, 0.2))                   by a counter: `set_step(program, i)`

A density of 1 or more is dense, exactly. The table and the counter can be changed in place between
calls (`set_densities`, `set_step`) without compiling again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.errors import did_you_mean
from fxq.graph import RUNTIME_STATE, add_buffer, input_name, insert_call, val_of

aten = torch.ops.aten
TABLE, LEVELS, STEP = (f"{RUNTIME_STATE}.{name}" for name in ("densities", "levels", "step"))


@dataclass(frozen=True)
class ByTimestep:
    """Densities by noise level.

    Args:
        levels: ascending bounds, in the unit of the model's time-step input.
        densities: one more than levels; entry i holds for levels[i-1] < time-step <= levels[i], the
            first for the least noise, the last for the most.
        name: of the model's argument. Of several time-steps in a batch the largest counts.
    """

    levels: tuple[float, ...]
    densities: tuple[float, ...]
    name: str = "timestep"

    def __post_init__(self) -> None:
        _check(self.densities, "ByTimestep.densities")
        if len(self.densities) != len(self.levels) + 1 or list(self.levels) != sorted(self.levels):
            raise ValueError(
                "ByTimestep: expected ascending levels and one more density, found levels "
                f"{self.levels} and densities {self.densities}"
            )


@dataclass(frozen=True)
class ByStep:
    """Densities by step: entry i holds after `set_step(program, i)`, the last one from there on.

    Args:
        densities: one per step, at least one.
    """

    densities: tuple[float, ...]

    def __post_init__(self) -> None:
        _check(self.densities, "ByStep.densities")


Schedule = float | ByTimestep | ByStep


def densities_of(schedule: Schedule) -> tuple[float, ...]:
    """Return the densities of a schedule, one per row of its table."""
    if isinstance(schedule, ByTimestep | ByStep):
        return schedule.densities
    _check((schedule,), "density")
    return (float(schedule),)


def density_table(schedule: Schedule, layers: Sequence[float | None]) -> Tensor:
    """Return the densities `[rows, layers]`, fp32.

    Args:
        schedule: the densities of layers that have none of their own.
        layers: each layer's own density at sparse steps, None for the schedule's. Dense rows stay
            dense.
    """
    rows = torch.tensor(densities_of(schedule))[:, None].expand(-1, len(layers))
    own = torch.tensor([float("nan") if density is None else density for density in layers])
    return torch.where(own.isnan() | (rows >= 1), rows, own)


def insert_densities(
    gm: GraphModule, schedule: Schedule, layers: Sequence[float | None], before: Node
) -> list[Node]:
    """Insert the table and the choice of its row; return each layer's density, 0-d fp32.

    Args:
        gm: the graph.
        schedule: see `density_table`.
        layers: likewise.
        before: where to insert; on its device.
    Raises:
        ValueError: the model has no such time-step input.
    """
    device = val_of(before).device
    values = density_table(schedule, layers).to(device)
    table = add_buffer(gm, TABLE, values, like=before)
    if len(values) == 1:
        row = insert_call(aten.select.int, (table, 0, 0), before=before)
    else:
        index = _row(gm, schedule, before)
        row = insert_call(aten.index.Tensor, (table, [index]), before=before)
    return [
        insert_call(aten.select.int, (row, 0, layer), before=before) for layer in range(len(layers))
    ]


def set_step(program: nn.Module, step: int) -> None:
    """Tell a program with a `ByStep` schedule which step comes next.

    Args:
        program: what `fxq.compress` returned, or `torch.compile` of it.
        step: 0 for the first.
    Raises:
        ValueError: a negative step, or a program without such a schedule.
    """
    if step < 0:
        raise ValueError(f"step: expected 0 or more, found {step}")
    for counter in _states(program, "step", "its density does not go by ByStep"):
        counter.fill_(step)


def set_densities(program: nn.Module, densities: Tensor | Sequence[Sequence[float]]) -> None:
    """Replace the densities of a program in place.

    Args:
        program: what `fxq.compress` returned, or `torch.compile` of it.
        densities: `[rows, layers]`, > 0, as many as the program has.
    Raises:
        ValueError: another shape, densities that are not positive, or a program without any or
            with several tables.
    """
    tables = _states(program, "densities", "it has no sparse attention")
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


def _states(program: nn.Module, name: str, why: str) -> list[Tensor]:
    """Return what each ReplaceAttention of the recipe keeps under `name`."""
    state: Any = getattr(getattr(program, "graph_module", program), RUNTIME_STATE, None)
    buffers = state.named_buffers() if isinstance(state, nn.Module) else ()
    found = [value for key, value in buffers if key.rstrip("0123456789") in (name, f"{name}_")]
    if not found:
        raise ValueError(
            f"program: expected one whose recipe sets {name!r}, found {type(program).__name__} "
            f"without: {why}; choose it in ReplaceAttention(density=...)"
        )
    return found


def _row(gm: GraphModule, schedule: Schedule, before: Node) -> Node:
    """Insert the index of the table's row that holds, 0-d int64."""
    if isinstance(schedule, ByTimestep):
        inputs = {input_name(n): n for n in gm.graph.nodes if n.op == "placeholder"}
        if schedule.name not in inputs:
            raise ValueError(
                f"ByTimestep.name: no input {schedule.name!r} of the model is a tensor; "
                f"{did_you_mean(schedule.name, inputs)}"
            )
        levels = torch.tensor(schedule.levels, device=val_of(before).device)
        bounds = add_buffer(gm, LEVELS, levels, like=before)
        noise = insert_call(aten.amax.default, (inputs[schedule.name],), before=before)
        noise = insert_call(aten.to.dtype, (noise, torch.float32), before=before)
        return insert_call(aten.bucketize.Tensor, (noise, bounds), before=before)
    step = torch.zeros((), dtype=torch.int64, device=val_of(before).device)
    counter = add_buffer(gm, STEP, step, like=before)
    last = len(densities_of(schedule)) - 1
    return insert_call(aten.clamp.default, (counter, 0, last), before=before)


def _check(densities: Sequence[float], name: str) -> None:
    numbers = all(isinstance(density, int | float) for density in densities)
    if not densities or not numbers or any(not density > 0 for density in densities):
        raise ValueError(
            f"{name}: expected positive shares of the key blocks (1 or more: dense), found "
            f"{densities}"
        )
