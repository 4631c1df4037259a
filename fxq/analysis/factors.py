"""Factors: which channels of a graph can be scaled, or shifted, without changing its function.

Every output channel of a linear, convolution or norm and every input channel of a linear or
convolution is a *variable*: the factor it is divided by. One pass over the graph finds which
variables must be equal and which must stay one. Each node's value gets labels that name the
variable of every element: 0 (`ZERO`) labels zeros, which any factor leaves as they are; 1 (`UNIT`)
what is not scaled; larger numbers are variables, negative ones their inverses. Each operator has a
rule (`factor_rules.py`). It

- carries labels along, through operators that move elements (`following.py`); a positive factor
  also passes through ReLU, pooling, a product with something else, and from the values to the
  result of attention;
- equates variables: both operands of a sum, both halves of a rotated pair, all tokens that
  attention mixes, a layer's input channel and what arrives there; query and key as inverses;
- or fixes them at one: everything else, with the reason.

What is equal is found as connected components. Shifts go through fewer operators: not through a
product, ReLU or zero padding, but through attention, whose rows sum to one.

The variables of a layer belong to its weight: layers that share one share their factors.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxq.analysis.following import Following, Labels
from fxq.analysis.labels import compact
from fxq.constants import Constants

ZERO = 0
UNIT = 1
Side = Literal["out", "in", "operand"]


@dataclass(frozen=True, eq=False)
class Slot:
    """The variables of one side of a layer or norm, or of an operand that can be rewritten.

    Args:
        node: the layer, norm or sum.
        side: its output channels, its input channels, or one operand of the sum.
        base: number of the first variable.
        size: how many variables.
        index: position of the operand in the sum's arguments.
        labels: the operand's variables, in a shape that broadcasts to its own.
    """

    node: Node
    side: Side
    base: int
    size: int
    index: int = 0
    labels: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """The variables `[size]`."""
        return torch.arange(self.base, self.base + self.size)


@dataclass
class Variables:
    """Numbers for variables, the same in a flow of scales and one of shifts."""

    count: int = UNIT + 1
    bases: dict[object, int] = field(default_factory=dict)

    def base(self, key: object, size: int) -> int:
        """Return the first of `size` consecutive numbers that belong to `key`."""
        if key not in self.bases:
            self.bases[key] = self.count
            self.count += size
        return self.bases[key]


class ChannelFlow(Following):
    """Labels, equations and fixed variables of one graph. `factor_walk.channel_flow` fills it.

    Args:
        scales: the flow of scales of the same graph makes this the flow of shifts; None for scales.
    """

    blank = UNIT

    def __init__(self, scales: "ChannelFlow | None") -> None:
        super().__init__()
        self.scales = scales
        self.constants: Constants = scales.constants if scales else Constants()
        self.variables: Variables = scales.variables if scales else Variables()
        self.why: dict[Node, str] = {}  # why a node's value, or part of it, is not scaled
        self.traits: dict[Node, frozenset[str]] = {}  # what a node's labels went through
        self.slots: list[Slot] = []
        # Labels of the queries and keys of every attention.
        self.compared: dict[Node, tuple[Tensor | None, Tensor | None]] = {}
        self._equal: list[Tensor] = []
        self._fixed: list[tuple[Tensor, str]] = []

    @property
    def shifts(self) -> bool:
        """Whether this is a flow of shifts."""
        return self.scales is not None

    @cached_property
    def components(self) -> tuple[Tensor, dict[int, str]]:
        """Return the component of every variable and of its inverse, and why components are fixed.

        Returns:
            `[2 * n_variables]`: entry 2v is the component of variable v, 2v + 1 that of 1 / v; and
            component -> reason for those that hold a variable fixed at one.
        """
        pairs = torch.cat([*self._equal, torch.empty(2, 0, dtype=torch.int64)], 1)
        a, b = torch.cat([_vertex(pairs), _vertex(-pairs)], 1)
        component = connected_components(2 * self.variables.count, a, b)
        reasons: dict[int, str] = {}
        for ids, reason in self._fixed:
            for found in component[torch.cat([2 * ids, 2 * ids + 1])].unique().tolist():
                reasons.setdefault(found, reason)
        for found in component[0::2][component[0::2] == component[1::2]].unique().tolist():
            reasons.setdefault(found, "its factor would have to be its own inverse")
        return component, reasons

    def slot(self, node: Node, side: Side, size: int, key: object) -> Slot:
        """Register the variables of one side of `node`; equal keys share them."""
        slot = Slot(node, side, self.variables.base((side, key), size), size)
        self.slots.append(slot)
        return slot

    def traits_of(self, value: Any) -> frozenset[str]:
        """Return what the labels of an argument went through."""
        return self.traits.get(value, frozenset())

    def says(self, labels: Tensor) -> bool:
        """Tell whether labels name a variable."""
        return bool((compact(labels) > UNIT).any())

    def set(self, node: Node, labels: Labels) -> None:
        """Give `node`'s value (or values) labels, or the reason why none of it is scaled."""
        super().set(node, labels)
        if labels is not None and node not in self.labels:
            whys = (self.why[n] for n in node.all_input_nodes if self.why.get(n))
            self.why[node] = next(whys, "nothing in front of it can be scaled")

    def equate(self, a: Tensor, b: Tensor) -> None:
        """State that the variables in two tensors of labels are equal, element by element.

        ZERO equals anything, UNIT fixes what it meets.
        """
        x, y = torch.broadcast_tensors(compact(a), compact(b))
        pairs = torch.stack([x.flatten(), y.flatten()])
        pairs = pairs[:, (pairs != ZERO).all(0) & (pairs[0] != pairs[1])]
        unit = (pairs.abs() == UNIT).any(0)
        self.fix(pairs[:, unit], "part of what it is tied to is not scaled")
        n = self.variables.count
        keys = ((pairs[0] + n) * (2 * n) + pairs[1] + n)[~unit].unique()
        self._equal.append(torch.stack([keys // (2 * n) - n, keys % (2 * n) - n]))

    def fix(self, labels: Tensor | list[Tensor] | None, reason: str) -> None:
        """State that the variables in labels must stay one."""
        for part in labels if isinstance(labels, list) else [labels]:
            if part is not None:
                ids = compact(part).abs().unique()
                self._fixed.append((ids[ids > UNIT], reason))

    def merge(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Equate labels along dimensions; return them with these dimensions at size 1."""
        for dim in dims:
            one = compact(labels).amax(dim, keepdim=True)
            self.equate(labels, one)
            shape = list(labels.shape)
            shape[dim] = 1
            labels = one.expand(shape)
        return labels

    def consume(self, slot: Slot, read: Node, dim: int) -> None:
        """Equate a layer's input channels with what arrives along dimension `dim` of `read`."""
        labels = self.tensor(read)
        if labels is None:
            self.fix(slot.ids, self.why.get(read) or "nothing in front of it can be scaled")
            return
        dim %= labels.ndim
        arriving = self.merge(labels, [d for d in range(labels.ndim) if d != dim]).flatten()
        self.fix(slot.ids[arriving == UNIT], self.why.get(read) or "part of its input cannot scale")
        self.equate(slot.ids, torch.where(arriving == UNIT, ZERO, arriving))


def _vertex(labels: Tensor) -> Tensor:
    return 2 * labels.abs() + (labels < 0)


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
