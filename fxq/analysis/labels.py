"""Labels: int64 tensors that say something of every element of a value, in the value's shape.

Labels hardly ever vary along all axes, so they are kept expanded (stride 0) along every dimension
they are constant along.
"""

import torch
from torch import Tensor
from torch.fx import Node

from fxq.graph import hint, shape_of


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


def filled(sizes: tuple[int, ...], label: int) -> Tensor:
    """Return one label for all elements, without memory for each."""
    return torch.full((1,) * len(sizes), label).expand(sizes)


def sizes_of(value: object) -> tuple[int, ...]:
    """Return the shape of a node's value, free sizes as at capture; () for a number."""
    return tuple(hint(size) for size in shape_of(value)) if isinstance(value, Node) else ()
