"""ObservedRanges: quantize in the ranges that `fxq.observe` saw, instead of calibrating.

A layer is known by the name of its weight, by the weight itself, and by which of its uses in one
graph it is: so graphs that hold a part of a model, under names of their own, find their layers, and
a recipe that was observed on another model is told.
"""

import copy
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.checkpoint import add_tensors
from fxq.dialect import OBSERVED, Dialect, observer_of
from fxq.graph import args_of, is_op, val_of, weight_of
from fxq.layer import Skip, treat
from fxq.observers import RangeObserver
from fxq.operators import VIEWS
from fxq.passes.common.convert import pending_layers
from fxq.pipeline import Pass
from fxq.rewriting import erase_dead, insert_module


@dataclass(frozen=True)
class ObservedLayer:
    """A layer, and what was seen of its input.

    Args:
        name: of its weight, as the whole model has it; `blocks.0.qkv` for `blocks.0.qkv.weight`.
        digest: of the weight.
        call: which use of this weight under this name it is in its graph, from 0.
        place: which use of this weight under any name.
        observer: of its input.
    """

    name: str
    digest: str
    call: int
    place: int
    observer: RangeObserver = field(repr=False, compare=False)

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from all others of a model."""
        return self.name, self.digest, self.call


@dataclass(frozen=True, eq=False, repr=False)
class ObservedRanges(Pass):
    """Give the observers of a graph the ranges that were seen; a layer that was not stays float,
    and says so."""

    layers: Sequence[ObservedLayer]

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __repr__(self) -> str:
        digest = hashlib.sha256()
        for layer in self.layers:
            digest.update(repr(layer).encode())
            add_tensors(digest, layer.observer.buffers())
        return f"ObservedRanges({len(self.layers)} layers, sha256 {digest.hexdigest()[:16]})"

    def run(self, gm: GraphModule) -> PassResult:
        """Fill the observers.

        Raises:
            ValueError: what was observed has the graph's layers with other weights.
        """
        found = list(observed_layers(gm))
        digests = {layer.digest for layer in self.layers}
        if found and not any(layer.digest in digests for _, layer in found):
            named = [layer.name for _, layer in found if self._named(layer)]
            if len(named) == len(found):
                raise ValueError(
                    f"recipe: expected the weights it was observed with, found others in "
                    f"{named[0]!r} and {len(named) - 1} more layers; observe this model"
                )
        names = {layer.name for _, layer in found}
        for node, layer in found:
            seen = self._find(layer, names)
            reason = seen if isinstance(seen, str) else differ(layer.observer, seen.observer)
            if isinstance(seen, ObservedLayer) and not seen.observer.count:
                reason = "it had no data while it was observed"
            if isinstance(seen, ObservedLayer) and not reason:
                _quantize_in(gm, node, seen.observer)
                continue
            edge = args_of(node)[0]
            node.replace_input_with(edge, edge.args[0])
            treat(node, type(self).__name__, Skip(reason, intended=False), spec=None)
        erase_dead(gm)
        return PassResult(gm, modified=bool(found))

    def _named(self, layer: ObservedLayer) -> list[ObservedLayer]:
        """Return what was seen under a layer's name: graphs may hold a part of a model, or know it
        under a name of their own."""
        exact = [known for known in self.layers if known.name == layer.name]
        return exact or [known for known in self.layers if _ends_alike(known.name, layer.name)]

    def _find(self, layer: ObservedLayer, names: Collection[str]) -> ObservedLayer | str:
        """Return what was seen of a layer, or why it is not known.

        Args:
            layer: of a graph.
            names: of all layers of that graph.
        """
        named = self._named(layer)
        found = [known for known in named if known.digest == layer.digest]
        chosen = [known for known in found if known.call == layer.call]
        if not found:  # one weight may have several names
            found = [known for known in self.layers if known.digest == layer.digest]
            chosen = [known for known in found if known.place == layer.place]
        # A part that is compiled alone calls its layers by names that others may have in full.
        inner = [
            known
            for known in self.layers
            if known.digest == layer.digest and known.name not in names
            if known.name.endswith(f".{layer.name}")
        ]
        chosen = list(dict.fromkeys([*chosen, *inner])) if chosen else chosen
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            names = ", ".join(known.name for known in chosen[:3])
            return f"its weight and the end of its name are those of several layers: {names}"
        if found:
            return "it is used more often here than in any graph that was observed"
        if named:
            return "its weight is not the one it was observed with"
        return "no graph reached it while it was observed"


def _ends_alike(name: str, other: str) -> bool:
    return name.endswith(f".{other}") or other.endswith(f".{name}")


def differ(observer: RangeObserver, seen: RangeObserver) -> str:
    """Return why an observer cannot have what another has seen; "" where it can."""
    if observer.is_like(seen):
        return ""
    return (
        f"observed as {seen.spec.granularity} with a scale of {seen.scale_shape}, and here "
        f"{observer.spec.granularity} with one of {observer.scale_shape}; use PerTensor(), or rows "
        "by position"
    )


def give_observer(gm: GraphModule, layer: Node, observer: RangeObserver) -> None:
    """Have a layer's input pass through an observer of its own, in the place of the one that it may
    share with other layers."""
    edge = args_of(layer)[0]
    layer.replace_input_with(edge, insert_module(gm, str(edge.target), observer, *edge.args))


def _quantize_in(gm: GraphModule, layer: Node, seen: RangeObserver) -> None:
    """Have a layer's input quantized in a range that was seen; layers of one edge with equal states
    share a quantizer."""
    edge = args_of(layer)[0]
    seen = seen.at_rank(val_of(edge).ndim)
    for other in edge.args[0].users:
        if other.op == "call_module" and other.args == edge.args and other is not edge:
            known = observer_of(gm, other)
            assert known is not None
            if _equal(known, seen):
                layer.replace_input_with(edge, other)
                return
    give_observer(gm, layer, seen.to(val_of(edge).device))


def _equal(one: RangeObserver, other: RangeObserver) -> bool:
    pairs = zip(one.buffers(), other.buffers(), strict=True)
    return one.spec == other.spec and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def observed_layers(gm: GraphModule) -> Iterator[tuple[Node, ObservedLayer]]:
    """Yield the layers of an observed graph whose input has an observer, in graph order."""
    calls, places = Counter[tuple[str, str]](), Counter[str]()
    for node, spec in pending_layers(gm):
        name, digest = name_of(node), digest_of(weight_of(node))
        call, place = calls[name, digest], places[digest]
        calls[name, digest], places[digest] = call + 1, place + 1
        if spec.activation is None or spec.activation.dynamic:
            continue
        observer = observer_of(gm, args_of(node)[0])
        assert observer is not None
        yield node, ObservedLayer(name, digest, call, place, observer)


def name_of(layer: Node) -> str:
    """Return the qualified name of a layer's weight, without its last part if that is `weight`."""
    weight = args_of(layer)[1]
    while is_op(weight, *VIEWS):
        weight = args_of(weight)[0]
    return str(weight.target).removesuffix(".weight")


def digest_of(tensor: Tensor) -> str:
    """Return a digest of a tensor's shape, dtype and values."""
    digest = hashlib.sha256()
    add_tensors(digest, [tensor])
    return digest.hexdigest()[:16]


def new_like(observer: RangeObserver) -> RangeObserver:
    """Return an observer of the same kind that has seen nothing."""
    made = copy.deepcopy(observer)
    made.reset()
    return made
