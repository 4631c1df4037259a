"""Following values through a graph: one walk, a tensor of labels per value, a rule per operator.

An analysis labels the elements it starts from and says what operators that compute do to labels.
Operators that only move elements are run on the labels themselves, so that no layout has to be
known: their rules are here, once for every analysis.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.analysis.labels import compact, filled, settle, sizes_of
from fxq.graph import args_of, hint, result_of, val_of
from fxq.operators import Movement, operand

Labels = Tensor | list[Tensor] | None  # a list for several results; None where nothing is known
Rule = Callable[[Any, Node], Labels]


class Following:
    """The labels of every value that is still to be read. An analysis derives from it."""

    blank: ClassVar[int]  # labels what the analysis has nothing to say of

    def __init__(self) -> None:
        self.labels: dict[Node, Any] = {}
        self._unread: Counter[Node] = Counter()

    def walk(self, gm: GraphModule, visit: Callable[[Any, Node, list[Node]], None]) -> None:
        """Visit every node of a graph in order.

        Args:
            gm: the graph.
            visit: called with this, the node, and what the node reads that has labels.
        """
        for node in gm.graph.nodes:
            visit(self, node, [read for read in node.all_input_nodes if read in self.labels])
            self._unread[node] = len(node.users)
            for read in node.all_input_nodes:  # labels of 100,000 tokens: do not keep them all
                self._unread[read] -= 1
                if not self._unread[read]:
                    self.labels.pop(read, None)

    def set(self, node: Node, labels: Labels) -> None:
        """Give a node's value (or values) labels, unless these are blank."""
        if isinstance(labels, list):
            self.labels[node] = [settle(part) for part in labels]
        elif labels is not None and self.says(labels := settle(labels)):
            self.labels[node] = labels

    def says(self, labels: Tensor) -> bool:
        """Tell whether labels are more than blank."""
        return bool((compact(labels) != self.blank).any())

    def tensor(self, value: Any) -> Tensor | None:
        """Return the labels of an argument, None where it has none of its own."""
        found = self.labels.get(value) if isinstance(value, Node) else None
        return found if isinstance(found, Tensor) else None

    def of(self, value: Any) -> Tensor:
        """Return the labels of an argument, blank where it has none of its own."""
        labels = self.tensor(value)
        return filled(sizes_of(value), self.blank) if labels is None else labels


def keep(walk: Following, node: Node) -> Tensor:
    """The result has the labels of the first operand."""
    return walk.of(args_of(node)[0])


def reshape(walk: Following, node: Node) -> Tensor:
    """The elements stay in order."""
    return keep(walk, node).reshape(sizes_of(node))


def rearrange(walk: Following, node: Node) -> Labels:
    """Run the operator on the labels."""

    def value(read: Node) -> Any:
        val = val_of(read)
        if isinstance(val, Tensor):
            return walk.of(read)
        return hint(val) if isinstance(val, int | torch.SymInt) else val

    result = result_of(node, value)
    return list(result) if isinstance(result, list | tuple) else result


def getitem(walk: Following, node: Node) -> Labels:
    """One of several results."""
    source, index = args_of(node)
    return walk.labels[source][index]


def pad(walk: Following, node: Node, label: int) -> Tensor:
    """Put `label` around the labels of the first operand."""
    sides = [hint(val_of(n)) if isinstance(n, Node) else n for n in operand(node, "pad")]
    return torch.constant_pad_nd(keep(walk, node), sides, label)


def by_movement(rules: Mapping[Rule, Iterable[Movement]]) -> dict[Movement | None, Rule]:
    """Return the rule of every movement."""
    return {movement: rule for rule, movements in rules.items() for movement in movements}


MOVES = by_movement({
    getitem: (Movement.ITEM,),
    reshape: (Movement.VIEW, Movement.RESHAPE),
    rearrange: (
        Movement.TRANSPOSE, Movement.EXPAND, Movement.REARRANGE, Movement.SPLIT, Movement.SCATTER,
    ),
})  # fmt: skip
