"""Apportion samples: whole numbers in proportion to scores, which add up to a total exactly."""

import math

from torch import Tensor


def apportion(scores: Tensor, total: int, *, floor: int = 0, limit: int | None = None) -> list[int]:
    """Return how many samples each step or group gives, in proportion to its score; `total` in all.

    Fractions are rounded so that the sum is exact: the largest remainders up. Of equal ones, those
    spread out evenly over the steps go first. Bounds that bind leave the rest in proportion.

    Args:
        scores: `[T]`, >= 0.
        total: N.
        floor: least number per step.
        limit: largest number per step.
    Raises:
        ValueError: the bounds leave no room for the total.
    """
    n_steps = len(scores)
    high = total if limit is None else limit
    if not n_steps * floor <= total <= n_steps * high or floor > high:
        raise ValueError(
            f"count: expected {n_steps * floor} to {n_steps * high} samples ({floor} to {high} at "
            f"each of {n_steps} time-steps), found {total}; change the count or the floor, or "
            "record more trajectories"
        )
    shares = [round(share, 9) for share in _shares(scores.double(), total, floor, high).tolist()]
    found = [math.floor(share) for share in shares]
    places = _spread_out(n_steps)
    order = sorted(range(n_steps), key=lambda i: (round(found[i] - shares[i], 9), places[i]))
    room = [i for i in order if found[i] < high]
    for i in room[: total - sum(found)]:
        found[i] += 1
    return found


def _shares(scores: Tensor, total: int, floor: int, high: int) -> Tensor:
    """Return scores times the factor for which, kept within the bounds, they add up to `total`."""
    # No step is left out where others are full.
    scores = scores.clamp(min=1e-9 * float(scores.max()))
    plain = scores * (total / scores.sum())
    if float(plain.min()) >= floor and float(plain.max()) <= high:
        return plain
    low, top = 0.0, (high + 1) / float(scores.min())
    for _ in range(200):  # halves until neighbouring floats
        middle = (low + top) / 2
        if float((scores * middle).clamp(floor, high).sum()) < total:
            low = middle
        else:
            top = middle
    return (scores * top).clamp(floor, high)


def _spread_out(n: int) -> list[int]:
    """Return the turn of each of n places when every next one is as far as can be from those that
    had theirs: by the reversed bits of its number."""
    bits = max(1, (n - 1).bit_length())
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(n)]
    turns = [0] * n
    for turn, place in enumerate(sorted(range(n), key=reverse.__getitem__)):
        turns[place] = turn
    return turns
