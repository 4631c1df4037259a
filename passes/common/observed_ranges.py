"""ObservedRanges: quantize in the ranges that `fxq.observe` saw, instead of calibrating.

A layer is known by its qualified name, by which of the calls of its module in one graph it is, and
by its weight: so graphs that hold a part of a model, under names of their own, find their layers,
and a recipe that was observed on another model is told.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.dialect import OBSERVED, Dialect
from fxq.graph import args_of, owner_name, weight_of
from fxq.layer import Skip, treat
from fxq.observers import RangeObserver
from fxq.passes.common.convert import pending_layers
from fxq.pipeline import Pass
from fxq.rewriting import erase_dead


@dataclass(frozen=True)
class ObservedLayer:
    """A layer, and what was seen of its input.

    Args:
        name: qualified, as the whole model has it.
        call: which of the calls of its module in one graph it is, from 0.
        weight: hash of its weight.
        observer: of its input; layers that read the same have the same.
    """

    name: str
    call: int
    weight: str
    observer: RangeObserver = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class ObservedRanges(Pass):
    """Give the observers of a graph the ranges that were seen; a layer that was not stays float,
    and says so."""

    layers: Sequence[ObservedLayer]

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def run(self, gm: GraphModule) -> PassResult:
        """Fill the observers.

        Raises:
            ValueError: what was observed has the graph's layers with other weights.
        """
        found = list(observed_layers(gm))
        known = {(layer.call, layer.weight) for layer in self.layers}
        names = {layer.name for layer in self.layers}
        named = [one for _, one in found if any(_is_end_of(one.name, name) for name in names)]
        foreign = [layer.name for layer in named if (layer.call, layer.weight) not in known]
        if foreign and len(foreign) == len(found):
            raise ValueError(
                f"recipe: expected the weights it was observed with, found others in {foreign[0]} "
                f"and {len(found) - 1} more layers; observe this model"
            )
        for node, layer in found:
            seen = self._find(layer)
            reason = seen if isinstance(seen, str) else _adopt(layer.observer, seen.observer)
            if reason:
                edge = args_of(node)[0]
                node.replace_input_with(edge, edge.args[0])
                treat(node, type(self).__name__, Skip(reason, intended=False), spec=None)
        erase_dead(gm)
        return PassResult(gm, modified=bool(found))

    def _find(self, layer: ObservedLayer) -> ObservedLayer | str:
        """Return what was seen of a layer, or why it is not known."""
        named = [
            known
            for known in self.layers
            if known.call == layer.call
            and (_is_end_of(layer.name, known.name) or _is_end_of(known.name, layer.name))
        ]
        found = [known for known in named if known.weight == layer.weight]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(known.name for known in found[:3])
            return f"its weight and the end of its name are those of several layers: {names}"
        if named:
            return "its weight is not the one it was observed with"
        return "no graph reached it while it was observed"


def _is_end_of(name: str, other: str) -> bool:
    """Tell whether a name is another's, or the end of it: graphs may hold a part of a model, or
    know it under a name of its own."""
    return other == name or other.endswith(f".{name}")


def _adopt(observer: RangeObserver, seen: RangeObserver) -> str:
    """Give an observer what another has seen; return why not, "" where it has."""
    if observer.spec != seen.spec or observer.scale_shape != seen.scale_shape:
        return (
            f"observed as {seen.spec.granularity} with a scale of {seen.scale_shape}, and here "
            f"{observer.spec.granularity} with one of {observer.scale_shape}; use PerTensor(), or "
            "rows by position"
        )
    for name, buffer in observer.named_buffers():
        buffer.copy_(getattr(seen, name))
    return ""


def observed_layers(gm: GraphModule) -> Iterator[tuple[Node, ObservedLayer]]:
    """Yield the layers of an observed graph whose input has an observer, in graph order."""
    calls: Counter[str] = Counter()
    for node, spec in pending_layers(gm):
        name = owner_name(node)
        call, calls[name] = calls[name], calls[name] + 1
        if spec.activation is None or spec.activation.dynamic:
            continue
        observer = gm.get_submodule(str(args_of(node)[0].target))
        assert isinstance(observer, RangeObserver)
        yield node, ObservedLayer(name, call, hash_of(weight_of(node)), observer)


def hash_of(weight: Tensor) -> str:
    """Return a hash of a tensor's shape, dtype and values."""
    digest = hashlib.sha256(f"{list(weight.shape)} {weight.dtype}".encode())
    plain = weight.detach().cpu().contiguous().flatten()
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
