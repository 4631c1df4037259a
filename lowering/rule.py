"""A rule puts a kernel in the place of an operator; a device is a list of rules.

Each node goes to the first rule of the device that is for it; where that declines, to the next.
`fxq.lowering.devices` has ours, and says how others add theirs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxq.layer import hand_on
from fxq.numerics import sqnr_db

REPLACED = "fxq_replaced"  # key in a node's meta, of a `Replaced`
TAKEN = "fxq_taken"  # key in the meta of a node that a rule has given a kernel
MIN_SQNR_DB = 120.0  # fp32 sums of thousands of terms in another order differ at 130 dB and more
MAX_ROUNDED_SHARE = 1e-3  # of outputs in a narrower format that may round to the neighbouring value


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
class Decision:
    """What a rule decided for one layer, and why.

    Args:
        kernel: the kernel that computes the layer, None where it runs as float on dequantized
            values.
        reason: why there is no kernel, or what to know about the one there is.
    """

    kernel: str | None
    reason: str = ""


@dataclass(frozen=True)
class Rule(ABC):
    """How one kernel takes the place of an operator. Subclasses are frozen dataclasses.

    A rule of a third party names in `devices` those it is for. `instead` names what computes a node
    where all rules decline, if reasons alone do not say it.
    """

    devices: ClassVar[tuple[str, ...]] = ()
    instead: ClassVar[str] = ""

    @abstractmethod
    def is_for(self, node: Node) -> bool:
        """Tell whether `node` is the operator of this rule, whatever its shapes and dtypes."""

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
            last: the later node whose value `new` has, where the kernel does that much more.
            kernel: what computes, where `new` only finishes its result.
        """
        old, kernel = last or layer, kernel or new
        hand_on(layer, kernel)
        new.meta[REPLACED] = Replaced(old.name, kernel.name, self)
        old.replace_all_uses_with(new)
        layer.meta[TAKEN] = True

    def keep(self, node: Node) -> None:
        """Leave a node as it is: its operator runs the kernel itself."""
        node.meta[TAKEN] = True

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> tuple[bool, bool]:
        """Tell whether integer accumulators are bit-equal to exact integer arithmetic, true of a
        kernel that has none; and whether the kernel is within its bounds: rounding, unless a rule
        says otherwise.

        Args:
            expected: the value of the node that was replaced, a tensor or several.
            found: that of the node in its place, on the same inputs.
            kernel: the node that computes.
            value: gives the value of any node, such as the kernel's inputs.
        """
        pairs = zip(tree_leaves(expected), tree_leaves(found), strict=True)
        return True, all(close(*pair) for pair in pairs)


def close(expected: Tensor, found: Tensor) -> bool:
    """Tell whether two results differ by floating-point rounding only."""
    if expected.shape != found.shape:
        return False
    if expected.dtype == torch.float32:
        return sqnr_db(expected, found) >= MIN_SQNR_DB
    # A narrower result was rounded on both sides, so a few values fall to the neighbour.
    differ = (expected != found) & ~(expected.isnan() & found.isnan())
    if is_code(expected) and bool((steps_between(expected, found) > 1).any()):
        return False
    return float(differ.float().mean()) <= MAX_ROUNDED_SHARE


def is_code(value: Tensor) -> bool:
    """Tell whether a result is codes in integers."""
    return value.dtype in (torch.int8, torch.uint8)


def steps_between(expected: Tensor, found: Tensor) -> Tensor:
    """Return how many codes two results of codes are apart."""
    return (expected.int() - found.int()).abs()


@dataclass(frozen=True)
class Device:
    """One kind of device. What it can do, and when a kernel pays, is beside its rules in its file.

    Args:
        name: as `Rule.devices` has it.
        is_this: whether a torch device, on the machine at hand, is one.
        rules: in the order in which they are tried.
    """

    name: str
    is_this: Callable[[torch.device], bool]
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Replaced:
    """What a node of a lowered graph stands for.

    Args:
        node: name of the node whose place it took.
        kernel: name of the node that computes.
        rule: that put it there.
    """

    node: str
    kernel: str
    rule: Rule
