"""A rule puts a kernel in the place of an operator; a device is a list of rules.

Each node goes to the first rule of the device that is for it; where that declines, to the next.
Rules and devices of third parties are found by entry point (`fxq.lowering.devices`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fxq.layer import hand_on
from fxq.lowering.decision import Decision
from fxq.lowering.exactness import Exactness, differ_by_rounding

REPLACED = "fxq_replaced"  # key in a node's meta: a `Replaced`


@dataclass(frozen=True)
class Lowering:
    """One graph on its way to LOWERED.

    Args:
        gm: the graph, which rules rewrite.
        device: to lower for.
        sizes: values of the graph's free sizes by name; those at capture where left out.
        shared: nodes that a rule made for more than one layer.
    """

    gm: GraphModule
    device: torch.device
    sizes: Mapping[str, int] | None = None
    shared: dict[Hashable, tuple[Node, Node]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule(ABC):
    """How one kernel takes the place of an operator; subclasses are frozen dataclasses.

    A device lists its own rules. One that is found by entry point says in `devices` which it is
    for, by `Device.name`. Where all rules of a node decline, `instead` computes it.
    """

    devices: ClassVar[tuple[str, ...]] = ()
    instead: ClassVar[str] = ""

    @abstractmethod
    def is_for(self, node: Node) -> bool:
        """Tell whether `node` is the operator this rule is for, whatever its shapes and dtypes."""

    @abstractmethod
    def apply(self, node: Node, lowering: Lowering) -> Decision:
        """Rewrite `node` and name the kernel; or decline, with the reason and nothing changed."""

    def replace(
        self, layer: Node, new: Node, *, last: Node | None = None, kernel: Node | None = None
    ) -> None:
        """Put `new` in the place of a layer, for `fxq.verify` to compare the two.

        Args:
            layer: the node the rule was applied to; its record goes to the kernel.
            new: what takes its place.
            last: the node behind it whose value `new` has, where the kernel does that much more.
            kernel: what computes, where `new` only finishes its result.
        """
        old, kernel = last or layer, kernel or new
        hand_on(layer, kernel)
        new.meta[REPLACED] = Replaced(old.name, kernel.name, self)
        old.replace_all_uses_with(new)

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> Exactness:
        """Tell whether the kernel computes what was simulated.

        Args:
            expected: the value of the node that was replaced.
            found: that of what replaces it, on the same inputs.
            kernel: the node that computes it.
            value: gives the value of any node, to see what went into the kernel.
        """
        return differ_by_rounding(expected, found)


@dataclass(frozen=True)
class Device:
    """What fxq knows of one kind of device; what it can do and when a kernel pays is in its file.

    Args:
        name: how rules and messages call it.
        is_this: whether a torch device, on the machine at hand, is one.
        rules: in the order in which they are tried.
    """

    name: str
    is_this: Callable[[torch.device], bool]
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Replaced:
    """What a node of a lowered graph stands for, in its `meta[REPLACED]`.

    Args:
        node: name of the node it replaces, in the graph that was lowered.
        kernel: name of the node that computes it.
        rule: that put it there.
    """

    node: str
    kernel: str
    rule: Rule
