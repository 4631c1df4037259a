"""The exceptions and warnings fxq raises, and how their messages are built.

A message has four parts: what was expected, what was found, where, and what to do. `ValueError` and
`TypeError` are used as they are for bad arguments; the classes here name situations Python has no
word for.
"""

import difflib
from collections.abc import Iterable


class UnsupportedError(NotImplementedError):
    """A combination nobody has implemented: a format without a kernel, a model that cannot be
    captured."""


class PassError(RuntimeError):
    """A graph that breaks a promise: a dialect violation, a pass that changed the float
    function."""


class MissingInputError(ValueError):
    """A graph lacks an input that a recipe goes by: wrong name, or a part of a model."""


class UnreadableGraphError(UnsupportedError):
    """A graph of Dynamo's that fxq cannot bring to operators on tensors. It stays as it is."""


class SkippedError(RuntimeError):
    """`strict=True` was asked for and something would have stayed float."""


class FxqWarning(UserWarning):
    """Something the user should know that does not make the result wrong."""


MOST_LISTED = 200  # names
MOST_PLACES = 3  # in a warning


def counted(count: int, what: str) -> str:
    """Return "1 layer", "2 layers"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def listed(names: Iterable[str]) -> str:
    """Return the first few of some names, each once, and how many others there are."""
    different = list(dict.fromkeys(names))
    rest = len(different) - MOST_PLACES
    more = f" and {counted(rest, 'other')}" if rest > 0 else ""
    return ", ".join(different[:MOST_PLACES]) + more


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `name`'s nearest neighbours among `known` as a sentence; where none is near, all of
    `known`, or how many they are."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    if len(options) > MOST_LISTED:
        return f"none of the {len(options)} known names is near"
    return "expected one of " + ", ".join(repr(o) for o in options)
