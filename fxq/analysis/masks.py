"""What an attention mask is known to hide, whatever the data: nothing, what comes later, or all
keys after the first n.

The last is `arange(S) < n` in its various spellings, with n a sum of masks, counts and constants.
A mask that is an input may be any dtype, as pipelines pass zeros and ones as floats. What cannot
be proved is not claimed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.analysis.shown import shown_for_sure
from fxq.constants import Constants
from fxq.graph import args_of, dtype_of, is_op, shape_of
from fxq.operators import COPIES, RESHAPES, Movement, movement_of, of, operand

aten = torch.ops.aten
SAME = COPIES | RESHAPES | of(Movement.EXPAND)  # changes neither the elements nor their order
# Comparison -> which operand counts up.
KEEPS = {aten.lt.Tensor: 0, aten.gt.Tensor: 1}
HIDES = {aten.ge.Tensor: 0, aten.le.Tensor: 1}
REPEATS = COPIES | {aten.expand.default, aten.repeat.default}
NO_BOUND = -(2**62)


class Masks:
    """Answers about the masks of one graph, for as long as its nodes stay as they are."""

    def __init__(self) -> None:
        self._constants, self._at_capture = Constants(), Constants(at_capture=True)
        self._causal: dict[Node, bool] = {}
        self._bounds: dict[Node, int] = {}
        self._shown: dict[Node, Tensor] = {}

    def hides_nothing(self, mask: Node) -> bool:
        """Tell whether a mask is constant and of no effect: all true, or a bias of zeros."""
        if dtype_of(mask) == torch.bool:
            return self._all_true(mask)
        value = self._constants.value(origin(mask))
        return value is not None and not bool(value.any())

    def is_causal(self, mask: Any) -> bool:
        """Tell whether a boolean mask hides from every query the keys after it."""
        mask = origin(mask)
        if not isinstance(mask, Node) or dtype_of(mask) != torch.bool:
            return False
        if mask not in self._causal:
            self._causal[mask] = self._hides_what_follows(mask)
        return self._causal[mask]

    def shows_at_least(self, mask: Node) -> int | None:
        """Return a number n such that a mask provably shows a prefix of the keys, n or more of
        them, and hides the rest; None where that is not proved."""
        mask, size = origin(mask), shape_of(mask)[-1]
        if movement_of(mask) is Movement.NOT and dtype_of(args_of(mask)[0]) == torch.bool:
            length = self._compared(origin(args_of(mask)[0]), size, HIDES)
        elif movement_of(mask) is Movement.MASKED_FILL:
            kept, hidden, value = args_of(mask)
            shows = not value and self._all_true(kept)
            length = self._compared(origin(hidden), size, HIDES) if shows else None
        else:
            length = self._compared(mask, size, KEEPS)
        return None if length is None else self._at_least(length)

    def shown_for_sure(self, mask: Node) -> Tensor:
        """Return which keys a mask shows every query of every sample in any call, bool `[S]`.

        Args:
            mask: of one query, `[..., S]`.
        """
        if mask not in self._shown:
            found = shown_for_sure(mask, self._constants)
            self._shown[mask] = found.flatten(0, -2).all(0)
        return self._shown[mask]

    def _hides_what_follows(self, mask: Node) -> bool:
        if movement_of(mask) is Movement.AND:
            return any(map(self.is_causal, args_of(mask)))
        if len(shape_of(mask)) < 2 or not 1 != shape_of(mask)[-1] == shape_of(mask)[-2]:
            return False
        value = self._at_capture.value(mask)
        return value is not None and not bool(value.triu(1).any())

    def _compared(self, node: Any, size: Any, comparisons: Mapping[Any, int]) -> Node | None:
        """Return n where `node` compares `arange(size)` along the last dimension with n `[..., 1]`;
        None where it is not proved."""
        if not isinstance(node, Node) or node.target not in comparisons:
            return None
        place = comparisons[node.target]
        counter, length = args_of(node)[place], args_of(node)[1 - place]
        value = self._constants.value(counter)
        if value is None or value.numel() != size or value.shape[-1] != size:
            return None
        if not torch.equal(value.flatten().cpu(), torch.arange(size)):
            return None
        return length if isinstance(length, Node) and shape_of(length)[-1:] == (1,) else None

    def _at_least(self, length: Any) -> int:
        """Return a bound below a number of tokens that is computed in the graph."""
        length = origin(length)
        if not isinstance(length, Node):
            return length if isinstance(length, int) else NO_BOUND
        if length not in self._bounds:
            self._bounds[length] = self._bound(length)
        return self._bounds[length]

    def _bound(self, length: Node) -> int:
        if movement_of(length) is Movement.ADD and operand(length, "alpha") == 1:
            return sum(map(self._at_least, args_of(length)[:2]))
        value = self._constants.value(length)
        if value is not None:
            return int(value.min())
        # A sum of booleans is not negative, nor is that of a mask among the inputs, of zeros and
        # ones; anything else may be.
        summed = args_of(length)[0] if movement_of(length) is Movement.SUM else None
        counts = summed is not None and dtype_of(summed) == torch.bool
        given = isinstance(source := origin(summed), Node) and source.op == "placeholder"
        return 0 if counts or given else NO_BOUND

    def _all_true(self, node: Any) -> bool:
        node = origin(node)
        movement = movement_of(node) if isinstance(node, Node) else None
        if movement is Movement.ONES:
            return True
        if is_op(node, aten.full.default) and operand(node, "fill_value") is True:
            return True
        value = self._constants.value(node)
        return value is not None and bool(value.all())


def origin(node: Any) -> Any:
    """Return what a mask or count is a view or copy of."""
    while is_op(node, *SAME):
        node = args_of(node)[0]
    return node


def keys_and_queries(mask: Node) -> tuple[Node, Node | None] | None:
    """Return the two parts of a boolean mask `[B, 1, S, S]` that shows some keys to some queries.

    Returns:
        the keys it shows; the queries it shows them to, None for all; each `[B, 1, 1, S]` or
        `[B, 1, S, 1]`. None where it is not made of two such parts.
    """
    parts: dict[int, Node] = {}
    factors = [mask]
    while factors:
        factor = factors.pop()
        while is_op(factor, *COPIES) and dtype_of(args_of(factor)[0]) == torch.bool:
            factor = args_of(factor)[0]
        if movement_of(factor) in (Movement.AND, Movement.MUL):
            factors += args_of(factor)[:2]
            continue
        if not isinstance(factor, Node) or dtype_of(factor) != torch.bool:
            return None
        found = _along_one_axis(factor)
        if found is None or parts.setdefault(found[0], found[1]) is not found[1]:
            return None
    return None if -1 not in parts else (parts[-1], parts.get(-2))


def _along_one_axis(mask: Node) -> tuple[int, Node] | None:
    """Return the axis of a mask `[B, 1, S, S]` along which it varies, -1 (keys) or -2 (queries),
    and the mask with a size of 1 along the other; None where it varies along both."""
    turned, node = False, mask
    if len(shape_of(node)) != 4:
        return None
    while shape_of(node)[-1] != 1 and shape_of(node)[-2] != 1:
        if is_op(node, *REPEATS):
            node = args_of(node)[0]
        elif is_op(node, aten.transpose.int) and {d % 4 for d in args_of(node)[1:3]} == {2, 3}:
            turned, node = not turned, args_of(node)[0]
        else:
            return None
        if len(shape_of(node)) != 4:
            return None
    by_keys = shape_of(node)[-2] == 1
    if turned:
        return (-2 if by_keys else -1), node
    return (-1 if by_keys else -2), node
