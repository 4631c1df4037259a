"""What every pruner shares: which linears it is for, and how the result is recorded."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.account import UNKNOWN, is_unknown, kind_of
from fxq.dialect import ATEN, Dialect
from fxq.graph import is_constant, is_op, is_settled, owner_name, tensor_of, weight_of
from fxq.identity import TensorKey
from fxq.layer import OVERRIDE, Skip, layer_of, treat
from fxq.operators import VIEWS
from fxq.passes.common import LAST
from fxq.passes.common.layer_choice import overridden
from fxq.passes.common.weight_method import Treated, WeightMethod
from fxq.passes.pruning.patterns import Pattern, Unstructured

Overrides = tuple[tuple[str, Pattern | None], ...]
HALF = Unstructured(0.5)
OUTPUT: Overrides = ((LAST, None),)  # output layers stay dense, as in the papers


@dataclass(frozen=True)
class Pruner(ABC):
    """What a pruner is asked for a single weight.

    Args:
        pattern: which weights may go, unless an override says otherwise.
        overrides: (pattern of names, `Pattern` or None) pairs, as `InsertObservers` has them; the
            first that matches a layer decides, None keeps it dense.
    """

    pattern: Pattern = HALF
    overrides: Overrides = OUTPUT

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def of_gram(self, moments: Tensor) -> Tensor:
        """Return what the pruner needs, given the sum of `x x^T` `[K, K]`."""
        return moments

    @abstractmethod
    def scores(self, weight: Tensor, moments: Tensor) -> Tensor:
        """Return how important each weight is as the layer is now `[N, K]`, >= 0; arguments as for
        `prune`."""

    def prune(
        self, weight: Tensor, moments: Tensor, pattern: Pattern, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a weight for the kept elements `[N, K]` and which these are `[N, K]`, bool.

        Args:
            weight: `[N, K]`.
            moments: of the input, as the pruner needs them.
            pattern: which weights may go.
            factor: what the importance of each input's weights is multiplied by `[K]`, > 0; None
                for 1.
        """
        scores = self.scores(weight, moments)
        return weight, pattern.keep(scores if factor is None else scores * factor)


@dataclass(frozen=True)
class Prune(Pruner, WeightMethod[Pattern]):
    """Prune linears block by block, before anything is quantized. Subclass as a frozen dataclass;
    fields as for `Pruner` and `WeightMethod`."""

    def plans(self, gm: GraphModule) -> Mapping[Node, Pattern]:
        """Return the pattern of each linear to prune."""
        return prunable(gm, type(self).__name__, self.pattern, self.overrides)

    def treat(self, weight: Tensor, moments: Tensor, plan: Pattern, mask: Tensor | None) -> Treated:
        """Prune a weight."""
        return pruned(*self.prune(weight, moments, plan), plan)


def pruned(weight: Tensor, mask: Tensor, pattern: Pattern) -> Treated:
    """Return a weight without what its mask does not keep; the count is checked."""
    pattern.check(mask)
    share = 1 - int(mask.count_nonzero()) / max(1, mask.numel())
    did = f"{share:.2%} pruned ({pattern})"
    return Treated(did, did, torch.where(mask, weight, 0.0), {"mask": mask})


def prunable(
    gm: GraphModule, by: str, pattern: Pattern, overrides: Overrides
) -> dict[Node, Pattern]:
    """Return the pattern of each linear to prune, and record of everything else why it stays.

    Args:
        gm: in the dialect ATEN.
        by: the pass that asks.
        pattern: of layers that no override matches.
        overrides: as for `Pruner`.
    Raises:
        ValueError: a layer is pruned already.
    """
    multiply = [n for n in gm.graph.nodes if not is_settled(n) and kind_of(n) is not None]
    linears = [node for node in multiply if kind_of(node) == "linear"]
    chosen = overridden(linears, overrides)
    plans: dict[Node, Pattern] = {}
    for node in multiply:
        name, plan = chosen.get(node, (None, pattern))
        if is_unknown(node):
            treat(node, by, UNKNOWN)
        elif kind_of(node) != "linear":
            treat(node, by, Skip(f"{by} does not prune {kind_of(node)}", intended=True))
        elif plan is None:
            treat(node, by, Skip(f"{OVERRIDE}{name!r} keeps it dense", intended=True))
        elif not is_constant(node.args[1]):
            treat(node, by, Skip("its weight is computed at run time", intended=False))
        elif layer_of(node).mask is not None:
            raise ValueError(
                f"{by}: expected dense layers, found {owner_name(node)} pruned before; keep it "
                f"as it is with overrides=(({owner_name(node)!r}, None),), or prune once"
            )
        elif not bool(weight_of(node).isfinite().all()):
            raise ValueError(
                f"weight of {owner_name(node)}: expected finite values, found NaN or Inf; repair "
                "the checkpoint"
            )
        else:
            plans[node] = plan
    return _untied(gm, by, plans)


def _untied(gm: GraphModule, by: str, plans: dict[Node, Pattern]) -> dict[Node, Pattern]:
    """Leave out layers whose weight something else reads that is not pruned alike."""
    readers: dict[TensorKey, set[Node]] = {}
    for node in [n for n in gm.graph.nodes if n.op == "get_attr"]:
        value = tensor_of(gm, node)
        if isinstance(value, Tensor):
            readers.setdefault(TensorKey.of(value), set()).update(_readers(node))
    untied = {}
    for layer, plan in plans.items():
        root: Any = layer.args[1]
        while root.op != "get_attr":
            root = root.args[0]
        sharing = readers[TensorKey.of(tensor_of(gm, root))]
        if other := next((node for node in sharing if plans.get(node) != plan), None):
            why = f"its weight is also that of {owner_name(other)}, which is not pruned alike"
            treat(layer, by, Skip(why, intended=False))
        else:
            untied[layer] = plan
    return untied


def _readers(node: Node) -> list[Node]:
    return [r for user in node.users for r in (_readers(user) if is_op(user, *VIEWS) else [user])]
