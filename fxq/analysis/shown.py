"""Keys that a mask shows for sure, whatever the data: ones beside a text's own mask, for instance.

One walk over what a mask is computed of. A label is SHOWN where an element is not zero in any call;
moves run on the labels, as in every analysis.
"""

import torch
from torch import Tensor
from torch.fx import Node

from fxq.analysis.following import MOVES, Following, Labels, by_movement, keep, pad
from fxq.analysis.labels import sizes_of
from fxq.constants import Constants
from fxq.graph import args_of, dtype_of
from fxq.operators import Movement, movement_of, operand

MAYBE = 0
SHOWN = 1


class _Shown(Following):
    blank = MAYBE


def shown_for_sure(mask: Node, constants: Constants) -> Tensor:
    """Return which elements of a mask are not zero in any call, bool in its shape, free sizes as at
    capture.

    Args:
        mask: any dtype, with few elements: it is looked at as a whole.
        constants: of its graph.
    """
    walk = _Shown()
    for node in _made_of(mask):
        value = constants.value(node)
        if value is not None and value.shape == sizes_of(node):
            walk.set(node, (value.cpu() != 0).long())
        elif (rule := RULES.get(movement_of(node))) is not None:
            walk.set(node, rule(walk, node))
    return walk.of(mask) == SHOWN


def _made_of(mask: Node) -> list[Node]:
    """Return what a mask is computed of by operators that the walk knows, in order."""
    found, stack = {mask}, [mask]
    while stack:
        node = stack.pop()
        more = [n for n in node.all_input_nodes if n not in found] if _known(node) else []
        found.update(more)
        stack += more
    return [node for node in mask.graph.nodes if node in found]


def _known(node: Node) -> bool:
    return movement_of(node) in RULES


def _copy(walk: _Shown, node: Node) -> Labels:
    """Rounded to an integer, what is not zero may be."""
    source, result = dtype_of(args_of(node)[0]), dtype_of(node)
    exact = result == torch.bool or result.is_floating_point or not source.is_floating_point
    return keep(walk, node) if exact else None


def _both(walk: _Shown, node: Node) -> Labels:
    """Of numbers a product, or what is left of the bits, may be zero."""
    factors = args_of(node)[:2]
    if any(not isinstance(f, Node) or dtype_of(f) != torch.bool for f in factors):
        return None
    one, other = map(walk.of, factors)
    return torch.minimum(one, other).expand(sizes_of(node))


def _ones(walk: _Shown, node: Node) -> Tensor:
    return torch.tensor(SHOWN).expand(sizes_of(node))


def _pad(walk: _Shown, node: Node) -> Labels:
    return pad(walk, node, int(bool(operand(node, "value"))))


RULES = MOVES | by_movement({
    _copy: (Movement.COPY,), _both: (Movement.AND, Movement.MUL), _ones: (Movement.ONES,),
    _pad: (Movement.PAD,),
})  # fmt: skip
