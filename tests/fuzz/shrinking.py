"""Make a failing case small: for a person to read, and for a test that stays."""

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from modules import Case, trimmed


def shrunk(case: Case, fails: Callable[[Case], bool], budget_s: float = 60.0) -> Case:
    """Return a simpler case that fails too: drop steps, then special values, one at a time.

    Args:
        case: one that fails.
        fails: whether a case still does, in the same way.
        budget_s: no new attempt begins after this time.
    """
    end, tried = time.monotonic() + budget_s, {case}
    while True:
        for simpler in map(trimmed, _simpler(case)):
            if time.monotonic() > end:
                return case
            if simpler not in tried:
                tried.add(simpler)
                if fails(simpler):
                    case = simpler
                    break
        else:
            return case


def _simpler(case: Case) -> Iterator[Case]:
    n = len(case.steps)
    for width in (n // 2, 1):
        for start in range(0, n if width else 0, max(width, 1)):
            yield replace(case, steps=case.steps[:start] + case.steps[start + width :])
    plain = Case()
    for name in (f.name for f in fields(case) if f.name != "steps"):
        if getattr(case, name) != getattr(plain, name):
            yield replace(case, **{name: getattr(plain, name)})
    for index, step in enumerate(case.steps):
        if step.size != 1:
            steps = (*case.steps[:index], replace(step, size=1), *case.steps[index + 1 :])
            yield replace(case, steps=steps)
    if case.shape:
        yield replace(case, shape=case.shape[1:])
