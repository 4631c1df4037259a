"""What an `aten.einsum` says: the labels of its operands' axes and of its result's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fxq.graph import args_of, shape_of

ELLIPSIS = "."  # in a label: an axis that "..." stands for


@dataclass(frozen=True)
class Equation:
    """One label per axis.

    Args:
        operands: labels of each operand.
        result: labels of the result.
    """

    operands: tuple[tuple[str, ...], ...]
    result: tuple[str, ...]

    @staticmethod
    def of(node: Node) -> "Equation":
        """Read a node that calls `aten.einsum`."""
        text, tensors = args_of(node)[:2]
        return Equation.parse(text, [len(shape_of(tensor)) for tensor in tensors])

    @staticmethod
    def parse(text: str, ndims: Sequence[int]) -> "Equation":
        """Read an equation as torch.einsum does.

        Args:
            text: such as `"bhid,bhjd->bhij"`; without an arrow, labels that occur once are the
                result's, in alphabetical order after "...".
            ndims: number of axes of each operand; "..." aligns from the right.
        """
        left, arrow, right = text.replace(" ", "").partition("->")
        operands = tuple(
            _labels(part, ndim - len(part.replace("...", "")))
            for part, ndim in zip(left.split(","), ndims, strict=True)
        )
        dots = max((labels for o in operands if (labels := _dots(o))), key=len, default=())
        if arrow:
            return Equation(operands, _labels(right, len(dots)))
        flat = [label for labels in operands for label in labels]
        once = sorted(x for x in set(flat) if flat.count(x) == 1 and not x.startswith(ELLIPSIS))
        return Equation(operands, (*dots, *once))

    @property
    def contracts(self) -> bool:
        """Whether it sums products, rather than permuting, summing or scaling one tensor."""
        return len(self.operands) > 1 and any(
            label not in self.result for labels in self.operands for label in labels
        )

    def sizes(self, shapes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Return the size of each label; of sizes that broadcast the one that is not 1.

        Args:
            shapes: of the operands.
        """
        found: dict[str, Any] = {}
        for labels, shape in zip(self.operands, shapes, strict=True):
            for label, size in zip(labels, shape, strict=True):
                if label not in found or (isinstance(found[label], int) and found[label] == 1):
                    found[label] = size
        return found


def _labels(part: str, n_dots: int) -> tuple[str, ...]:
    before, dots, after = part.partition("...")
    if not dots:
        return tuple(before)
    # Numbered from the right, as they align.
    return (*before, *(f"{ELLIPSIS}{i}" for i in reversed(range(n_dots))), *after)


def _dots(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(label for label in labels if label.startswith(ELLIPSIS))
