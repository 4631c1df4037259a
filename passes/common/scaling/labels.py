"""Labels: int64 tensors that name, for every element of a value, the variable it is scaled by.

0 (`ZERO`) labels zeros, which any factor leaves as they are; 1 (`UNIT`) labels what is not scaled;
larger numbers are variables, negative ones their inverses. Labels hardly ever vary along tokens, so
they are kept expanded (stride 0) along every dimension they are constant along.
"""

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import hint, shape_of

ZERO = 0
UNIT = 1


def compact(labels: Tensor) -> Tensor:
    """Return labels with the dimensions they are expanded along at size 1."""
    for dim in range(labels.ndim):
        if labels.stride(dim) == 0 and labels.size(dim) > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def settle(labels: Tensor) -> Tensor:
    """Return the same labels, expanded along every dimension they are constant along."""
    small = compact(labels)
    for dim in range(small.ndim):
        if small.size(dim) > 1 and bool((small == small.narrow(dim, 0, 1)).all()):
            small = small.narrow(dim, 0, 1).clone()
    return small.expand(labels.shape)


def sizes_of(value: object) -> tuple[int, ...]:
    """Return the shape of a node's value, free sizes as at capture; () for a number."""
    return tuple(hint(size) for size in shape_of(value)) if isinstance(value, Node) else ()


def connected_components(n: int, a: Tensor, b: Tensor) -> Tensor:
    """Return the smallest member of each vertex's component `[n]`.

    Args:
        n: number of vertices.
        a: one end of each edge `[n_edges]`, int64.
        b: the other end.
    """
    component = torch.arange(n)
    while True:
        lowest = torch.minimum(component[a], component[b])
        following = component.clone()
        # An edge lowers its ends and what these pointed to, so that long chains collapse fast.
        for ends in (a, b, component[a], component[b]):
            following.scatter_reduce_(0, ends, lowest, "amin")
        following = following[following]
        if torch.equal(following, component):
            return component
        component = following
