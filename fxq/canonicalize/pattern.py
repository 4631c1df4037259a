"""A small matcher: patterns are nested calls, variables bind to whatever stands there.

    x = Var("x")
    pattern = Call(MUL, x, Call(SIGMOID, x))          # x * sigmoid(x)
    found = match(pattern, node)                       # {"x": node} or None

Addition and multiplication match in either order. A number matches a number within 1e-6, a variable
that occurs twice must bind to the same node.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxq.operators import ADD, MUL

COMMUTATIVE = (ADD, MUL)


@dataclass(frozen=True)
class Var:
    """Binds anything: a node or a number."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of one of `targets`. Trailing arguments of the node beyond `args` are left to the
    rewrite's own checks."""

    targets: Collection[Any]
    args: tuple[Any, ...]

    def __init__(self, targets: Collection[Any], *args: Any) -> None:
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "args", args)


Bindings = dict[str, Any]


def match(pattern: Any, value: Any, bindings: Mapping[str, Any] | None = None) -> Bindings | None:
    """Return what the variables of `pattern` bind to at `value`, None where it does not match."""
    known = dict(bindings or {})
    if isinstance(pattern, Var):
        if pattern.name in known:
            return known if known[pattern.name] is value else None
        return known | {pattern.name: value}
    if isinstance(pattern, Call):
        return _match_call(pattern, value, known)
    if isinstance(pattern, int | float) and isinstance(value, int | float):
        return known if abs(pattern - value) <= 1e-6 * max(1.0, abs(pattern)) else None
    return known if pattern == value else None


def match_any(patterns: Sequence[Any], value: Any) -> Bindings | None:
    """Return the bindings of the first of `patterns` that matches."""
    return next((found for p in patterns if (found := match(p, value)) is not None), None)


def _match_call(pattern: Call, value: Any, known: Bindings) -> Bindings | None:
    if (
        not isinstance(value, Node)
        or value.op != "call_function"
        or value.target not in pattern.targets
    ):
        return None
    if len(value.args) < len(pattern.args):
        return None
    if value.kwargs.get("alpha", 1) != 1 or "rounding_mode" in value.kwargs:
        return None
    args = value.args[: len(pattern.args)]
    orders = itertools.permutations(args) if pattern.targets in COMMUTATIVE else [args]
    for order in orders:
        found: Bindings | None = known
        for part, arg in zip(pattern.args, order, strict=True):
            found = match(part, arg, found)
            if found is None:
                break
        if found is not None:
            return found
    return None
