"""Choose calibration samples from what `fxq.record` kept of denoising runs.

calls = fxq.record(pipe.unet, lambda: pipe(prompts), max_calls=1000)
chosen = eda_dm.select(pipe.unet, calls, 256)
program = fxq.compress(pipe.unet, chosen[0], recipe, data=chosen)
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor, nn

from fxq.binding import check_model
from fxq.errors import FxqWarning
from fxq.passes.common.apportion import apportion
from fxq.passes.common.taps import check_tap
from fxq.passes.eda_dm.features import compare_steps, find_tap
from fxq.passes.eda_dm.selection import (
    MedianRadius,
    Radius,
    assign,
    density,
    normalised,
    resolve_radius,
    score,
)
from fxq.passes.eda_dm.trajectories import Call, Trajectories, trajectories

VARIETY_WEIGHT = 1.2  # published for images of classes; 1.0 for scenes, 5 for images of texts


@dataclass(frozen=True, eq=False)
class Selection(Sequence[Call]):
    """Calls to calibrate with: batches of one time-step each, in the order of the sampler.

    Args:
        calls: with the rows that were chosen.
        timesteps: of the sampler, in its order.
        counts: samples of each.
        samples: of each call, the number of the recorded call, and which of its rows.
        tap: the submodule whose input was compared, "" where nothing was.
        density: neighbours of each step `[T]`.
        variety: of each step `[T]`, a sum of cosine distances.
        score: of each step `[T]`.
    """

    calls: Sequence[Call] = field(repr=False)
    timesteps: tuple[float, ...]
    counts: tuple[int, ...]
    samples: tuple[tuple[int, tuple[int, ...]], ...] = field(repr=False)
    tap: str = ""
    density: Tensor | None = field(default=None, repr=False)
    variety: Tensor | None = field(default=None, repr=False)
    score: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.calls)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | Sequence[Call]:
        return self.calls[index]


def select(
    module: nn.Module,
    calls: Sequence[Call],
    count: int,
    *,
    tap: str | None = None,
    timestep: str = "timestep",
    radius: Radius = MedianRadius(),  # noqa: B008  a frozen value
    variety_weight: float = VARIETY_WEIGHT,
    floor: int = 0,
    seed: int = 0,
    rows_at_once: int = 8,
) -> Selection:
    """Choose samples: each time-step gives as many as its features' density and variety deserve.

    Sample m is a row of a recorded call, exactly as it was, at a step that chance gave to its
    trajectory. The module runs up to the tap once for each recorded row.

    Args:
        module: the float module that was recorded, in eval mode.
        calls: what `fxq.record` returned, all calls of one or more whole runs.
        count: samples in all.
        tap: the submodule whose input is compared; the block in the middle unless named.
        timestep: the argument that says the step.
        radius: within which steps are neighbours: of the features' own scale, or a mean squared
            difference (published: `RADIUS_CIFAR`, `RADIUS_LSUN`).
        variety_weight: of variety against density.
        floor: least number of samples per step; ranges by time-step need several.
        seed: of the assignment of trajectories to steps.
        rows_at_once: trajectories whose features are in memory together.
    Raises:
        ValueError: no whole runs, one time-step only, NaN in a call, features that are zero or not
            finite, or not enough trajectories.
        MissingInputError: no such argument.
    """
    check_model(module)
    found = trajectories(module, calls, timestep)
    _check_count(found, count, floor)
    if tap is None:
        tap = find_tap(module, found.rows_of(found.paths[0][0], [0]))
    check_tap(module, tap)
    similar = compare_steps(module, found, tap, rows_at_once)
    distances = similar.distances()
    near = density(distances, resolve_radius(radius, distances))
    scores = score(near, similar.variety, variety_weight)
    flat = [
        name
        for name, values in (("density", near), ("variety", similar.variety))
        if not bool(normalised(values).any())
    ]
    if flat:
        warnings.warn(
            f"eda_dm.select: {' and '.join(flat)} of all {len(scores)} time-steps are the same at "
            f"{tap!r}, and do not count; another radius or tap may tell them apart",
            FxqWarning,
            stacklevel=2,
        )
    chosen = _take(found, apportion(scores, count, floor=floor, limit=found.count), seed)
    return Selection(*chosen, tap, near, similar.variety, scores)


def select_evenly(
    module: nn.Module,
    calls: Sequence[Call],
    count: int,
    *,
    timestep: str = "timestep",
    seed: int = 0,
) -> Selection:
    """Choose equally many samples of each time-step: what `select` is to be compared with.

    Args:
        module: as for `select`; it does not run.
        calls: as for `select`.
        count: samples in all.
        timestep: the argument that says the step.
        seed: of the assignment of trajectories to steps.
    """
    found = trajectories(module, calls, timestep)
    _check_count(found, count, 0)
    scores = torch.ones(len(found.timesteps))
    return Selection(*_take(found, apportion(scores, count, limit=found.count), seed))


def _check_count(found: Trajectories, count: int, floor: int) -> None:
    most = len(found.timesteps) * found.count
    if not 1 <= count <= most or not 0 <= floor * len(found.timesteps) <= count:
        raise ValueError(
            f"count: expected 1 to {most} samples, and at least the floor for each time-step, "
            f"found {count} with a floor of {floor} for {len(found.timesteps)} time-steps of "
            f"{found.count} trajectories; record more trajectories"
        )


def _take(
    found: Trajectories, numbers: Sequence[int], seed: int
) -> tuple[list[Call], tuple[float, ...], tuple[int, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    """Return the chosen calls, time-steps, numbers, and where each call is from."""
    rows: dict[tuple[int, int], list[int]] = {}
    for trajectory, step in assign(numbers, found.count, seed):
        path, row = found.place(trajectory)
        rows.setdefault((step, path), []).append(row)
    samples = tuple(
        (found.paths[path][step], tuple(sorted(rows[step, path]))) for step, path in sorted(rows)
    )
    calls = [found.rows_of(number, chosen) for number, chosen in samples]
    return calls, found.timesteps, tuple(numbers), samples
