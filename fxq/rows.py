"""Rows: which row of a table of parameters holds, as plain frozen values.

A scale, a zero-point or a density may have one value per noise level, per step, per token position
or per length of a call. The values are the rows of a table, and a tensor in the graph chooses the
row, so that one compiled graph serves all of them (`fxq.row_choice`). Beyond the table's ends the
nearest row holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

EVERY = -1  # count of positions: as many as the token axis has when the graph is captured


@dataclass(frozen=True)
class ByTimestep:
    """By the noise level, which the model is told anyway: works on an unmodified pipeline.

    A batch may mix rows: each sample has the row of its own time-step.

    Args:
        levels: ascending bounds, in the unit of the model's time-step input. Row i holds for
            levels[i-1] < time-step <= levels[i]: the first for the least noise, the last for the
            most. One row more than levels.
        name: of the model's argument, `[B]`, `[1]` or a scalar.
        known: rows are those of known time-steps, and others have the nearest one's: a run that
            does not reach all rows is not warned of.
    """

    levels: tuple[float, ...]
    name: str = "timestep"
    known: bool = False

    def __post_init__(self) -> None:
        levels = self.levels
        numbers = type(levels) is tuple and all(type(level) in (int, float) for level in levels)
        if not numbers or not all(map(math.isfinite, levels)) or not _ascends(levels):
            raise ValueError(
                "ByTimestep.levels: expected a tuple that ascends, of finite numbers, found "
                f"{levels!r}"
            )

    @classmethod
    def nearest(cls, timesteps: Sequence[float], name: str = "timestep") -> "ByTimestep":
        """Return a row for each of `timesteps`, in ascending order; between two of them the nearer
        one holds."""
        known = sorted({float(t) for t in timesteps})
        return cls(tuple((a + b) / 2 for a, b in pairwise(known)), name, known=True)

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.levels) + 1

    def __str__(self) -> str:
        return "by timestep"


@dataclass(frozen=True)
class ByStep:
    """By a counter: row i holds after `set_step(program, i)`, the last one from there on.

    While ranges are calibrated, batch i of the data is step i, from 0 again after the last step: as
    the calls of one run after another are. Each process counts the batches of its own share.

    Args:
        count: number of rows.
    """

    count: int

    def __post_init__(self) -> None:
        _check_count(self)

    def __str__(self) -> str:
        return "by step"


@dataclass(frozen=True)
class ByPosition:
    """By the position of a token in its sequence: each token has a row.

    Neighbours may share a range (`fxq.passes.common.GroupPositions`): their rows are equal then.

    Args:
        count: number of rows. `EVERY` is replaced by the number of tokens of each layer; one
            without a token axis has one row.
        name: of the model's argument that holds positions `[T]` or `[B, T]`, such as
            `cache_position`: prefill and decode then have the same row for the same token. None
            counts along the token axis, the second to last.
    """

    count: int
    name: str | None = None

    def __post_init__(self) -> None:
        _check_count(self)

    def __str__(self) -> str:
        return "by position"


@dataclass(frozen=True)
class ByLength:
    """By how many tokens a layer sees in a call: the steps of a next-scale model, which draws 1, 4,
    9, ... tokens at once, or a prompt and the tokens after it.

    Args:
        lengths: ascending. Row i holds for lengths[i-1] < tokens <= lengths[i], along the second to
            last axis; the last one for more tokens too. A layer without a token axis has one row.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = self.lengths
        counts = type(lengths) is tuple and all(type(n) is int and n > 0 for n in lengths)
        if not lengths or not counts or not _ascends(lengths):
            raise ValueError(
                "ByLength.lengths: expected a tuple that ascends, of numbers of tokens, found "
                f"{lengths!r}"
            )

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def __str__(self) -> str:
        return "by length"


Rows = ByTimestep | ByStep | ByPosition | ByLength


def _ascends(numbers: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(numbers))


def _check_count(rows: ByStep | ByPosition) -> None:
    if isinstance(rows, ByPosition) and rows.count == EVERY:
        return
    if type(rows.count) is not int or rows.count < 1:
        raise ValueError(f"{type(rows).__name__}.count: expected 1 or more, found {rows.count!r}")
