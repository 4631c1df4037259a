"""Conditions on free sizes: for which of them a captured graph is what the model computes.

A branch on a size is taken while tracing, and only that branch is in the graph. torch.export says
for which sizes it would be taken again, as Python text. A `Condition` is that text, read once into
a term of a few functions: it comes from files too, and nothing of theirs is executed.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_CHARACTERS = 4096
LARGEST = 1 << 62  # of what a power is taken
# A name of a size, a number, or a function and its operands.
Term = str | int | float | tuple[Any, ...]


def _power(base: float, exponent: float) -> float:
    if isinstance(base, int | float) and abs(base) ** min(abs(exponent), 64) > LARGEST:
        raise OverflowError
    return base**exponent


def _both(*parts: Any) -> bool:
    return all(parts)


def _either(*parts: Any) -> bool:
    return any(parts)


OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: _power,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.USub: operator.neg, ast.Not: operator.not_, ast.And: _both, ast.Or: _either,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "math.trunc": math.trunc, "math.floor": math.floor, "math.ceil": math.ceil,
    "math.sqrt": torch.sym_sqrt, "torch.sym_float": torch.sym_float, "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min, "max": torch.sym_max, "min": torch.sym_min, "abs": operator.abs,
    "float": torch.sym_float, "int": torch.sym_int, "round": round,
}  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """What free sizes must satisfy.

    Args:
        text: a comparison of names and numbers in Python, `64*s77 <= 1000`.
    Raises:
        ValueError: text that is none.
    """

    text: str
    term: Term = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.text) > MOST_CHARACTERS:
            raise ValueError(f"condition: expected text, found {len(self.text)} characters")
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
            object.__setattr__(self, "term", _term(tree))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"condition: expected arithmetic on sizes, found {self.text[:100]!r}"
            ) from error

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether sizes satisfy it; where it has no value (a division by zero), they do not.

        Raises:
            KeyError: a size of it is not among `sizes`.
        """
        try:
            return bool(_value(self.term, sizes))
        except (ZeroDivisionError, OverflowError):
            return False

    def written(self, places: Mapping[str, str]) -> str:
        """Return the text with what a person calls the sizes in the place of their names."""
        return re.sub(r"[A-Za-z_]\w*", lambda found: places.get(found[0], found[0]), self.text)


def conditions_of(
    guards: Sequence[str], shapes: Mapping[str, Sequence[int | str]]
) -> tuple[list[Condition], list[str]]:
    """Return the conditions among what torch.export asks of a call, and the rest as it is.

    Args:
        guards: Python text, in which a size is `L['x'].size()[0]`.
        shapes: of the tensors, by where they are in the call; a free size is its name.
    """
    conditions, others = [], []
    for guard in guards:
        try:
            text = re.sub(
                r"L\['(\w+)'\]((?:\[[^\]]+\])*)\.size\(\)\[(\d+)\]",
                lambda found: str(shapes[found[1] + found[2]][int(found[3])]),
                guard,
            )
            conditions.append(Condition(text))
        except (ValueError, KeyError, IndexError):
            others.append(guard)
    return conditions, others


def _term(tree: ast.AST) -> Term:
    match tree:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(op=kind, operand=operand) if type(kind) in OPERATORS:
            return OPERATORS[type(kind)], _term(operand)
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in OPERATORS:
            return OPERATORS[type(kind)], _term(left), _term(right)
        case ast.BoolOp(op=kind, values=values):
            return OPERATORS[type(kind)], *map(_term, values)
        case ast.Compare(left=left, ops=kinds, comparators=rights):
            terms = [_term(part) for part in (left, *rights)]
            pairs = [
                (OPERATORS[type(kind)], a, b)
                for kind, a, b in zip(kinds, terms, terms[1:], strict=False)
                if type(kind) in OPERATORS
            ]
            if len(pairs) == len(kinds):
                return pairs[0] if len(pairs) == 1 else (_both, *pairs)
        case ast.Call(func=function, args=args, keywords=[]):
            name = ast.unparse(function)
            if name in FUNCTIONS:
                return FUNCTIONS[name], *map(_term, args)
    raise ValueError(ast.dump(tree)[:100])


def _value(term: Term, sizes: Mapping[str, int]) -> Any:
    if isinstance(term, str):
        return sizes[term]
    if isinstance(term, tuple):
        function, *operands = term
        return function(*[_value(operand, sizes) for operand in operands])
    return term
